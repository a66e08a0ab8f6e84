// What stands between the matrix products of a layer: norms with the residual sum, rotary embedding, SwiGLU. Each reads and
// writes its rows once, 16 bytes at a time, and computes in float.

#include <half.cuh>

namespace {

constexpr int WARP = 32;
constexpr uint32_t ALL = 0xffffffff;

__device__ float sum_of_warp(float x) {
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) {
        x += __shfl_xor_sync(ALL, x, distance);
    }
    return x;
}

// A block of up to 1024 threads, whole warps.
__device__ float sum_of_block(float x) {
    __shared__ float sums[WARP];
    x = sum_of_warp(x);
    if (threadIdx.x % WARP == 0) {
        sums[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    return sum_of_warp(threadIdx.x % WARP < blockDim.x / WARP ? sums[threadIdx.x % WARP] : 0);
}

// sum = x + delta, normed = sum / rms(sum) * weight, of one row [8 * units] a block; x itself is the sum, and `sum` not
// written, where `delta` is null. The sum is rounded before it is normed, as it is where it is stored.
template <typename T>
__device__ void add_rms_norm(const Eight<T> *x, const Eight<T> *delta, const Eight<T> *weight, Eight<T> *sum,
                             Eight<T> *normed, uint32_t units, float epsilon) {
    const uint64_t row = uint64_t(blockIdx.x) * units;
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

// Of the heads [rows, all_heads, head_dim], the first q_heads are normed by q_weight [head_dim], the next kv_heads by
// k_weight, and both rotated by the angles whose cosines and sines [rows, head_dim / 2] are given, as Qwen3 does: element
// i < head_dim / 2 with element i + head_dim / 2. A block has one row, a warp one head at a time, a lane four elements:
// two neighbours of each half. The result is [rows, q_heads + kv_heads, head_dim].
template <typename T>
__device__ void norm_rope(const T *heads, const T *q_weight, const T *k_weight, const float2 *cos, const float2 *sin,
                          T *out, uint32_t all_heads, uint32_t q_heads, uint32_t kv_heads, uint32_t head_dim,
                          float epsilon) {
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const uint32_t pairs = head_dim / 4;
    const uint64_t row = blockIdx.x;
    cos += row * pairs;
    sin += row * pairs;
    auto pairs_of = [](const T *x) { return reinterpret_cast<const uint32_t *>(x); };
    for (uint32_t head = warp; head < q_heads + kv_heads; head += warps) {
        const uint32_t *from = pairs_of(heads + (row * all_heads + head) * head_dim);
        const uint32_t *weight = pairs_of(head < q_heads ? q_weight : k_weight);
        uint32_t *to = reinterpret_cast<uint32_t *>(out + (row * (q_heads + kv_heads) + head) * head_dim);
        float squares = 0;
        for (uint32_t at = lane; at < 2 * pairs; at += WARP) {
            const float2 x = Half<T>::unpack(from[at]);
            squares += x.x * x.x + x.y * x.y;
        }
        const float inverse = rsqrtf(sum_of_warp(squares) / head_dim + epsilon);
        for (uint32_t at = lane; at < pairs; at += WARP) {
            const float2 c = cos[at], s = sin[at];
            float2 re = Half<T>::unpack(from[at]), im = Half<T>::unpack(from[at + pairs]);
            const float2 re_weight = Half<T>::unpack(weight[at]), im_weight = Half<T>::unpack(weight[at + pairs]);
            re = {re.x * inverse * re_weight.x, re.y * inverse * re_weight.y};
            im = {im.x * inverse * im_weight.x, im.y * inverse * im_weight.y};
            to[at] = Half<T>::pack(re.x * c.x - im.x * s.x, re.y * c.y - im.y * s.y);
            to[at + pairs] = Half<T>::pack(im.x * c.x + re.x * s.x, im.y * c.y + re.y * s.y);
        }
    }
}

// silu(gate) * up of rows that hold 8 * units gates, then as many ups.
template <typename T>
__device__ void swiglu(const Eight<T> *gate_up, Eight<T> *out, uint64_t count, uint32_t units) {
    const uint64_t at = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
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

#define LAYER(DTYPE, T)                                                                                              \
    extern "C" __global__ void add_rms_norm_##DTYPE(const Eight<T> *x, const Eight<T> *delta, const Eight<T> *weight, \
                                                    Eight<T> *sum, Eight<T> *normed, uint32_t units,                 \
                                                    float epsilon) {                                                 \
        add_rms_norm<T>(x, delta, weight, sum, normed, units, epsilon);                                              \
    }                                                                                                                \
    extern "C" __global__ void norm_rope_##DTYPE(const T *heads, const T *q_weight, const T *k_weight,               \
                                                 const float2 *cos, const float2 *sin, T *out, uint32_t all_heads,   \
                                                 uint32_t q_heads, uint32_t kv_heads, uint32_t head_dim,             \
                                                 float epsilon) {                                                    \
        norm_rope<T>(heads, q_weight, k_weight, cos, sin, out, all_heads, q_heads, kv_heads, head_dim, epsilon);     \
    }                                                                                                                \
    extern "C" __global__ void swiglu_##DTYPE(const Eight<T> *gate_up, Eight<T> *out, uint64_t count,                \
                                              uint32_t units) {                                                      \
        swiglu<T>(gate_up, out, count, units);                                                                       \
    }

LAYER(f16, __half)
LAYER(bf16, __nv_bfloat16)
