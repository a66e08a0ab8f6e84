// What comes before and after the walks of tree_gradient_hopper.cuh: numbers of each pair and zeros, then the sums of walks
// as gradients.
#pragma once

#include <tree_gradient_memory.cuh>

namespace {

// A thread's two rows of gradients of keys, and its two columns of every eight.
template <typename T> struct KeyRows {
    T *row[2];

    __device__ KeyRows(T *to, uint32_t first_key, uint32_t kv_head, const GradientSizes &sizes) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t key = first_key + 16 * (threadIdx.x / 32) + 8 * half + threadIdx.x % 32 / 4;
            T *own = to + (uint64_t(key) * sizes.kv_heads + kv_head) * GRADIENT_DIM + threadIdx.x % 4 * 2;
            row[half] = key < sizes.rows ? own : nullptr;
        }
    }
    __device__ void write(int n, const Floats &sums, float scale) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (row[half]) {
                *reinterpret_cast<uint32_t *>(row[half] + 8 * n) =
                    Half<T>::pack(scale * sums.at[2 * half], scale * sums.at[2 * half + 1]);
            }
        }
    }
};

// Of one step, by PAIRS * 4 threads.
template <typename T>
__device__ void begin(const T *out, const T *dout, const float *lse, float *pair_numbers, float *pair_sums,
                      const GradientSizes &sizes) {
    const Step step(sizes, blockIdx.x / sizes.kv_heads, blockIdx.x % sizes.kv_heads);
    const uint32_t pair = threadIdx.x / 4, row = step.first_row + pair / sizes.group;
    const uint32_t head = step.first_head + pair % sizes.group;
    const bool valid = pair < PAIRS / sizes.group * sizes.group && row < sizes.rows;
    float product = 0;
    for (int i = 0; valid && i < GRADIENT_DIM / 32; ++i) {
        const uint32_t column = 8 * (4 * i + threadIdx.x % 4);
        float x[8], y[8];
        reinterpret_cast<const Eight<T> *>(out + row * sizes.out_row + head * sizes.out_head + column)->to_floats(x);
        reinterpret_cast<const Eight<T> *>(dout + row * sizes.dout_row + head * sizes.dout_head + column)->to_floats(y);
        for (int j = 0; j < 8; ++j) {
            product += x[j] * y[j];
        }
    }
    product = sum_of_quad(product);
    if (threadIdx.x % 4 == 0) {
        float *own = pair_numbers + step.at * PAIR_NUMBERS + pair;
        // What is no query has zeros for it and for its output's gradient: its weights must only be finite.
        own[0] = valid ? lse[uint64_t(head) * sizes.rows + row] * LOG2_E : 0;
        own[PAIRS] = product;
    }
    for (uint32_t at = threadIdx.x; at < PAIR_SUMS / 4; at += 4 * PAIRS) {
        reinterpret_cast<Floats *>(pair_sums + uint64_t(step.at) * PAIR_SUMS)[at] = {};
    }
}

// The gradients of a step's queries. By 8 columns of two rows a thread: those that a quad of threads has summed.
template <typename T>
__device__ void end_pairs(const float *pair_sums, T *dq, const Step &step, const GradientSizes &sizes) {
    const uint32_t n = threadIdx.x % 8, quad = threadIdx.x / 8;
    for (uint32_t warpgroup = 0; warpgroup < 2; ++warpgroup) {
        const auto *from = reinterpret_cast<const Floats *>(pair_sums + uint64_t(step.at) * PAIR_SUMS);
        Floats sums[4];
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            sums[lane] = from[(8 * warpgroup + n) * 128 + 4 * quad + lane];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t pair = 16 * (quad / 8) + 8 * half + quad % 8;
            const uint32_t row = step.first_row + pair / sizes.group, head = step.first_head + pair % sizes.group;
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                values[i] = sizes.scale * sums[i / 2].at[2 * half + i % 2];
            }
            if (pair < PAIRS / sizes.group * sizes.group && row < sizes.rows) {
                T *to = dq + (uint64_t(row) * sizes.kv_heads * sizes.group + head) * GRADIENT_DIM;
                reinterpret_cast<Eight<T> *>(to)[8 * warpgroup + n] = Eight<T>::of_floats(values);
            }
        }
    }
}

// The gradients of a split block's keys, from their parts in order.
template <typename T>
__device__ void end_keys(const float *parts, const uint32_t *split_block, const uint32_t *first_part, uint32_t split,
                         uint32_t kv_head, T *dk, T *dv, const GradientSizes &sizes) {
    const uint32_t first = first_part[split], end = first_part[split + 1];
    auto add = [&](uint32_t at) {
        Floats sums = {};
        for (uint32_t part = first; part < end; ++part) {
            const float *own = parts + (uint64_t(part) * sizes.kv_heads + kv_head) * 2 * KEY_SUMS;
            const Floats more = reinterpret_cast<const Floats *>(own)[at];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums.at[i] += more.at[i];
            }
        }
        return sums;
    };
    const KeyRows<T> dk_rows(dk, OWN_KEYS * split_block[split], kv_head, sizes);
    const KeyRows<T> dv_rows(dv, OWN_KEYS * split_block[split], kv_head, sizes);
#pragma unroll 2
    for (int n = 0; n < GRADIENT_DIM / 8; ++n) {
        const uint32_t at = n * DIFFERENTIATORS + threadIdx.x;
        dk_rows.write(n, add(at), sizes.scale);
        dv_rows.write(n, add(KEY_SUMS / 4 + at), 1);
    }
}

// Of a split block's keys, then of a step's queries. By DIFFERENTIATORS threads.
template <typename T>
__device__ void end(const float *pair_sums, const float *parts, const uint32_t *split_block, const uint32_t *first_part,
                    T *dq, T *dk, T *dv, const GradientSizes &sizes) {
    const uint32_t splits = gridDim.x / sizes.kv_heads - sizes.steps();
    const uint32_t number = blockIdx.x / sizes.kv_heads, kv_head = blockIdx.x % sizes.kv_heads;
    if (number < splits) {
        end_keys(parts, split_block, first_part, number, kv_head, dk, dv, sizes);
    } else {
        end_pairs(pair_sums, dq, Step(sizes, number - splits, kv_head), sizes);
    }
}

} // namespace
