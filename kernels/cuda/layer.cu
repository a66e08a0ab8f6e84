// What stands between the matrix products of a layer: norms with the residual sum, rotary embedding, SwiGLU. Each reads and
// writes its rows once, 16 bytes at a time, and computes in float.

#include <half.cuh>
#include <launch.cuh>

namespace {

constexpr int WARP = 32;
constexpr uint32_t ALL = 0xffffffff;

// The block's number, counted from the last: rows that the kernel before wrote last are read first, while the cache has
// them.
__device__ uint32_t block_from_the_end() { return gridDim.x - 1 - blockIdx.x; }

// Of `lanes` neighbours, a power of two.
__device__ float sum_of_lanes(float x, uint32_t lanes) {
    for (uint32_t distance = lanes / 2; distance; distance /= 2) {
        x += __shfl_xor_sync(ALL, x, distance);
    }
    return x;
}

// A block of up to 1024 threads, whole warps.
__device__ float sum_of_block(float x) {
    __shared__ float sums[WARP];
    x = sum_of_lanes(x, WARP);
    if (threadIdx.x % WARP == 0) {
        sums[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    return sum_of_lanes(threadIdx.x % WARP < blockDim.x / WARP ? sums[threadIdx.x % WARP] : 0, WARP);
}

// sum = x + delta, normed = sum / rms(sum) * weight, of one row [8 * units] a block; x itself is the sum, and `sum` not
// written, where `delta` is null. The sum is rounded before it is normed, as it is where it is stored.
template <typename T>
__device__ void add_rms_norm(const Eight<T> *x, const Eight<T> *delta, const Eight<T> *weight, Eight<T> *sum,
                             Eight<T> *normed, uint32_t units, float epsilon) {
    await_previous();
    const uint64_t row = uint64_t(block_from_the_end()) * units;
    const Eight<T> *values = delta ? sum + row : x + row;
    float squares = 0;
    for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
        float own[8];
        Eight<T> all = x[row + unit];
        all.to_floats(own);
        if (delta) {
            float other[8];
            delta[row + unit].to_floats(other);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                own[i] += other[i];
            }
            all = Eight<T>::of_floats(own);
            sum[row + unit] = all;
            all.to_floats(own);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            squares += own[i] * own[i];
        }
    }
    const float inverse = rsqrtf(sum_of_block(squares) / (8 * units) + epsilon);
    // Each thread reads what it wrote.
    for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
        float own[8], scale[8];
        values[unit].to_floats(own);
        weight[unit].to_floats(scale);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            own[i] *= inverse * scale[i];
        }
        normed[row + unit] = Eight<T>::of_floats(own);
    }
}

// Radians from one position to the next, for each pair of elements that are rotated together.
struct Frequencies {
    float at[128];
};

// Of all rows and pairs, `count`, at the rows' positions: an angle is rounded before its cosine and sine are taken.
__device__ void angles(const uint32_t *positions, const Frequencies &frequencies, float *cos, float *sin, uint64_t count,
                       uint32_t pairs) {
    await_previous();
    const uint64_t at = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) {
        const float angle = float(positions[at / pairs]) * frequencies.at[at % pairs];
        cos[at] = cosf(angle);
        sin[at] = sinf(angle);
    }
}

// Of the heads [rows, all_heads, 8 * pieces], the first q_heads are normed by q_weight [8 * pieces], the next kv_heads by
// k_weight, and both rotated by the angles whose cosines and sines [rows, 4 * pieces] are given, as Qwen3 does: element
// i < 4 * pieces with element i + 4 * pieces. A block has one row; `lanes` neighbours, a power of two that is not less than
// the pieces, have one head at a time, each of them four elements of either half: what they read stays in registers, the
// angles for all heads. The result is [rows, q_heads + kv_heads, 8 * pieces].
template <typename T>
__device__ void norm_rope(const Four<T> *heads, const Four<T> *q_weight, const Four<T> *k_weight, const Floats *cos,
                          const Floats *sin, Four<T> *out, uint32_t all_heads, uint32_t q_heads, uint32_t kv_heads,
                          uint32_t pieces, uint32_t lanes, float epsilon) {
    await_previous();
    const uint32_t piece = threadIdx.x % lanes, own = threadIdx.x / lanes, step = blockDim.x / lanes;
    const uint32_t wanted = q_heads + kv_heads;
    const uint64_t row = block_from_the_end();
    const bool has_piece = piece < pieces;
    const Floats c = has_piece ? cos[row * pieces + piece] : Floats{}, s = has_piece ? sin[row * pieces + piece] : Floats{};
    // All threads make as many turns, for they sum together.
    for (uint32_t first = 0; first < wanted; first += step) {
        const uint32_t head = first + own;
        const bool works = has_piece && head < wanted;
        Floats re{}, im{};
        if (works) {
            const Four<T> *from = heads + (row * all_heads + head) * 2 * pieces + piece;
            re = from[0].floats();
            im = from[pieces].floats();
        }
        float squares = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            squares += re.at[i] * re.at[i] + im.at[i] * im.at[i];
        }
        const float inverse = rsqrtf(sum_of_lanes(squares, lanes) / (8 * pieces) + epsilon);
        if (!works) {
            continue;
        }
        const Four<T> *weight = (head < q_heads ? q_weight : k_weight) + piece;
        const Floats re_weight = weight[0].floats(), im_weight = weight[pieces].floats();
        Floats x, y;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float normed_re = re.at[i] * inverse * re_weight.at[i], normed_im = im.at[i] * inverse * im_weight.at[i];
            x.at[i] = normed_re * c.at[i] - normed_im * s.at[i];
            y.at[i] = normed_im * c.at[i] + normed_re * s.at[i];
        }
        Four<T> *to = out + (row * wanted + head) * 2 * pieces + piece;
        to[0] = Four<T>::of(x);
        to[pieces] = Four<T>::of(y);
    }
}

// silu(gate) * up of rows that hold 8 * units gates, then as many ups.
template <typename T>
__device__ void swiglu(const Eight<T> *gate_up, Eight<T> *out, uint64_t count, uint32_t units) {
    await_previous();
    const uint64_t at = uint64_t(block_from_the_end()) * blockDim.x + threadIdx.x;
    if (at >= count) {
        return;
    }
    const uint64_t row = at / units, unit = at % units;
    float gate[8], up[8];
    gate_up[row * 2 * units + unit].to_floats(gate);
    gate_up[row * 2 * units + units + unit].to_floats(up);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        up[i] *= gate[i] / (1 + expf(-gate[i]));
    }
    out[at] = Eight<T>::of_floats(up);
}

} // namespace

extern "C" __global__ void rotary_angles(const uint32_t *positions, const __grid_constant__ Frequencies frequencies,
                                         float *cos, float *sin, uint64_t count, uint32_t pairs) {
    angles(positions, frequencies, cos, sin, count, pairs);
}

#define LAYER(DTYPE, T)                                                                                              \
    extern "C" __global__ void add_rms_norm_##DTYPE(const Eight<T> *x, const Eight<T> *delta, const Eight<T> *weight, \
                                                    Eight<T> *sum, Eight<T> *normed, uint32_t units,                 \
                                                    float epsilon) {                                                 \
        add_rms_norm<T>(x, delta, weight, sum, normed, units, epsilon);                                              \
    }                                                                                                                \
    extern "C" __global__ void norm_rope_##DTYPE(                                                                    \
        const Four<T> *heads, const Four<T> *q_weight, const Four<T> *k_weight, const Floats *cos, const Floats *sin,\
        Four<T> *out, uint32_t all_heads, uint32_t q_heads, uint32_t kv_heads, uint32_t pieces, uint32_t lanes,      \
        float epsilon) {                                                                                             \
        norm_rope<T>(heads, q_weight, k_weight, cos, sin, out, all_heads, q_heads, kv_heads, pieces, lanes, epsilon);\
    }                                                                                                                \
    extern "C" __global__ void swiglu_##DTYPE(const Eight<T> *gate_up, Eight<T> *out, uint64_t count,                \
                                              uint32_t units) {                                                      \
        swiglu<T>(gate_up, out, count, units);                                                                       \
    }

LAYER(f16, __half)
LAYER(bf16, __nv_bfloat16)
