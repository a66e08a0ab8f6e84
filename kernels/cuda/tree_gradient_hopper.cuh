// Gradients of tree attention on GPUs of compute capability 9.0: the backward pass of FlashAttention-2 (arXiv 2307.08691,
// algorithm 2) on walks of blocks of keys, in the manner of FlashAttention-3 (arXiv 2407.08608).
//
// A block of threads has a block of keys and walks through the rows that see them, in steps of PAIRS (row, head) pairs of
// one key head. The keys' sums stay in registers; what a step sends to its queries is added in memory, to sums of float32
// that other blocks add to as well, in any order.
//
// Three kernels follow each other: one for what each pair has and for zeros, one for the walks, and one that brings the
// sums to the dtype of the gradients.
#pragma once

#include <products.cuh>
#include <tree_gradient_ends.cuh>

namespace {

// The kernel begins with 168 registers a thread; all together these are as many.
constexpr int DIFFERENTIATOR_REGISTERS = 240, FETCHER_REGISTERS = 24;

// Tensors that a walk reads by boxes: of 64 columns of a step's queries and outputs, of a block's keys or values.
struct Boxes {
    const CUtensorMap &q, &dout, &k, &v;
};

// Rows of steps' memory behind their pairs, which no copy fills. By PAIRS threads.
__device__ void clear_rest(const GradientMemory &memory, uint32_t group) {
    if (threadIdx.x >= PAIRS / group * group) {
        for (uint32_t at = 0; at < GRADIENT_STAGES; ++at) {
            for (int chunk = 0; chunk < GRADIENT_DIM / 8; ++chunk) {
                copy16(address<PAIRS>(memory.q.stage(at), threadIdx.x, chunk), nullptr, false);
                copy16(address<PAIRS>(memory.dout.stage(at), threadIdx.x, chunk), nullptr, false);
            }
        }
    }
    commit();
    wait<0>();
}

// By FETCHERS threads.
__device__ void fetch(const Boxes &boxes, const float *pair_numbers, const Walk &walk, const GradientSizes &sizes) {
    const GradientMemory memory;
    const uint32_t lane = threadIdx.x % FETCHERS, bytes = PAIRS / sizes.group * sizes.group * GRADIENT_DIM * 2;
    if (lane == 0) {
        arrive_expecting(memory.keys.full(0), 2 * memory.KEY_BYTES);
        copy_columns<GRADIENT_DIM>(memory.base + memory.K, OWN_KEYS, boxes.k, walk.kv_head, walk.first_key,
                                   memory.keys.full(0));
        copy_columns<GRADIENT_DIM>(memory.base + memory.V, OWN_KEYS, boxes.v, walk.kv_head, walk.first_key,
                                   memory.keys.full(0));
    }
    uint32_t at = 0;
    for (uint32_t row = walk.start; row < walk.end; row += sizes.step_rows(), ++at) {
        const Step step(sizes, row / sizes.step_rows(), walk.kv_head);
        auto copy = [&](uint32_t to, uint32_t barrier, const CUtensorMap &map) {
            if (lane == 0) {
                arrive_expecting(barrier, bytes);
                copy_columns<GRADIENT_DIM>(to, PAIRS, map, step.first_head, row, barrier);
            }
        };
        memory.q.await_empty(at);
        copy(memory.q.stage(at), memory.q.full(at), boxes.q);
        copy16(memory.base + memory.numbers(at) + 16 * lane, pair_numbers + step.at * PAIR_NUMBERS + 4 * lane, true);
        arrive_copied(memory.q.full(at));
        memory.dout.await_empty(at);
        copy(memory.dout.stage(at), memory.dout.full(at), boxes.dout);
    }
    // A thread must not end before its copies.
    wait_for_all();
}

// A thread's two keys: `key`, which is row lane / 4 of its warp's sixteen, and the one 8 rows after it.
struct OwnKeys {
    uint32_t key;
    // Rows from each on that see it, none for what is no key.
    uint32_t span[2];
    // Where the first of the warp's keys' subtrees ends.
    uint32_t first_end;

    __device__ OwnKeys(const Walk &walk, const uint32_t *subtree_end, uint32_t rows)
        : key(walk.first_key + 16 * (threadIdx.x / 32) + threadIdx.x % 32 / 4), first_end(rows) {
#pragma unroll
        for (uint32_t i = 0; i < 16; ++i) {
            first_end = min(first_end, subtree_end[min(first() + i, rows - 1)]);
        }
        for (int half = 0; half < 2; ++half) {
            const uint32_t own = key + 8 * half;
            span[half] = own < rows ? subtree_end[own] - own : 0;
        }
    }

    __device__ uint32_t first() const { return key - threadIdx.x % 32 / 4; }
    // Whether all of the warp's keys are seen by all of so many rows.
    __device__ bool are_seen(uint32_t row, uint32_t rows) const {
        return first() + 15 <= row && row + rows <= first_end;
    }

    __device__ void hide(float (&weights)[PAIRS / 8][4], const uint32_t *row_of, uint32_t row) const {
#pragma unroll
        for (int n = 0; n < PAIRS / 8; ++n) {
            const uint2 pair = reinterpret_cast<const uint2 *>(row_of)[4 * n + threadIdx.x % 4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (row + (i % 2 ? pair.y : pair.x) - key - 8 * (i / 2) >= span[i / 2]) {
                    weights[n][i] = 0;
                }
            }
        }
    }
};

// A step's products as a left factor.
template <typename T> __device__ void pack_pairs(const float (&x)[PAIRS / 8][4], uint32_t (&to)[PAIRS / 16][4]) {
#pragma unroll
    for (int n = 0; n < PAIRS / 8; ++n) {
        to[n / 2][n % 2 * 2] = Half<T>::pack(x[n][0], x[n][1]);
        to[n / 2][n % 2 * 2 + 1] = Half<T>::pack(x[n][2], x[n][3]);
    }
}

// sums = scores^T k, of half of the columns of `k`.
template <typename T> __device__ void multiply_scores(float (&sums)[8][4], uint32_t scores_memory, uint32_t k_memory) {
#pragma unroll
    for (int step = 0; step < OWN_KEYS / 16; ++step) {
        const uint64_t scores = descriptor(scores_memory + 16 * step * 128, 0);
        const uint64_t keys = descriptor(k_memory + 16 * step * 128, 0);
        if (step) {
            multiply_across<T, false>(sums, scores, keys);
        } else {
            multiply_across<T, true>(sums, scores, keys);
        }
    }
}

using KeySums = float[GRADIENT_DIM / 8][4];

// From a step's products of keys and queries, and `lse` of its pairs.
__device__ void weigh(float (&weights)[PAIRS / 8][4], const float2 *lse, float unit) {
#pragma unroll
    for (int n = 0; n < PAIRS / 8; ++n) {
        const float2 pair = lse[4 * n];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            weights[n][i] = power_of_two(weights[n][i] * unit - (i % 2 ? pair.y : pair.x));
        }
    }
}

// From a step's products of values and outputs' gradients, and `delta` of its pairs.
__device__ void slope(float (&slopes)[PAIRS / 8][4], const float (&weights)[PAIRS / 8][4], const float2 *delta) {
#pragma unroll
    for (int n = 0; n < PAIRS / 8; ++n) {
        const float2 pair = delta[4 * n];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            slopes[n][i] = weights[n][i] * (slopes[n][i] - (i % 2 ? pair.y : pair.x));
        }
    }
}

// The thread's slopes to `scores` [OWN_KEYS, PAIRS], for both warpgroups.
__device__ void share(const uint32_t (&gradients)[PAIRS / 16][4], uint32_t scores) {
    const uint32_t key = 16 * (threadIdx.x / 32) + threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < PAIRS / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t to = address<OWN_KEYS>(scores, key + 8 * half, n);
            store4(to + 4 * (threadIdx.x % 4), gradients[n / 2][n % 2 * 2 + half]);
        }
    }
}

// A walk, by one of the threads that compute.
template <typename T> struct Walker {
    GradientMemory memory;
    const Walk &walk;
    const GradientSizes &sizes;
    OwnKeys own;
    KeySums dk = {}, dv = {};
    float weights[PAIRS / 8][4], slopes[PAIRS / 8][4];
    uint32_t packed[PAIRS / 16][4], gradients[PAIRS / 16][4];

    __device__ Walker(const Walk &walk, const uint32_t *subtree_end, const GradientSizes &sizes)
        : walk(walk), sizes(sizes), own(walk, subtree_end, sizes.rows) {}

    // Adds what the walk's steps send to their queries to `sums`.
    __device__ void run(float *sums) {
        // No division stands in the loop.
        const uint32_t rows = sizes.step_rows(), next = sizes.kv_heads * PAIR_SUMS, half = warpgroup();
        sums += uint64_t(Step(sizes, walk.start / rows, walk.kv_head).at) * PAIR_SUMS;
        sums += half * (PAIR_SUMS / 2) + threadIdx.x % 128 * 4;
        memory.keys.await_full(0);
        uint32_t at = 0;
        for (uint32_t row = walk.start; row < walk.end; row += rows, sums += next, ++at) {
            step(row, rows, at, half);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                add_to(sums + 4 * 128 * n, slopes[n]);
            }
        }
        wait_for_products<0>();
        settle(dk);
    }

  private:
    // Leaves what it sends to its queries in `slopes`; the tensor cores still have the products of slopes and queries, for
    // the keys.
    __device__ void step(uint32_t row, uint32_t rows, uint32_t at, uint32_t half) {
        // Bytes from a panel of 64 columns to the warpgroup's keys, and to its half of the panels.
        const uint32_t own_keys = half * 64 * 128, own_panel = half * OWN_KEYS * 128;
        const auto *lse = reinterpret_cast<const float2 *>(shared_memory() + memory.numbers(at)) + threadIdx.x % 4;
        memory.q.await_full(at);
        begin_products();
        multiply_panels<T, GRADIENT_DIM, OWN_KEYS, PAIRS>(weights, memory.base + memory.K + own_keys, memory.q.stage(at));
        commit_products();
        memory.dout.await_full(at);
        begin_products();
        multiply_panels<T, GRADIENT_DIM, OWN_KEYS, PAIRS>(slopes, memory.base + memory.V + own_keys, memory.dout.stage(at));
        commit_products();
        wait_for_products<1>();
        settle(weights);
        settle(dk);
        if (at > 0) {
            memory.q.emptied(at - 1);
        }
        weigh(weights, lse, sizes.scale * LOG2_E);
        if (!own.are_seen(row, rows)) {
            own.hide(weights, reinterpret_cast<const uint32_t *>(shared_memory() + memory.ROW_OF), row);
        }
        pack_pairs<T>(weights, packed);
        settle(packed);
        settle(dv);
        begin_products();
        add_panels<T>(dv, packed, memory.dout.stage(at));
        commit_products();
        wait_for_products<1>();
        settle(slopes);
        slope(slopes, weights, lse + PAIRS / 2);
        pack_pairs<T>(slopes, gradients);
        share(gradients, memory.scores(at));
        publish();
        await_threads<DIFFERENTIATORS>();
        settle(gradients);
        settle(dk);
        begin_products();
        multiply_scores<T>(slopes, memory.scores(at), memory.base + memory.K + own_panel);
        commit_products();
        add_panels<T>(dk, gradients, memory.q.stage(at));
        commit_products();
        wait_for_products<1>();
        settle(slopes);
        settle(dv);
        memory.dout.emptied(at);
    }
};

template <typename T>
__device__ void walk(const Boxes &boxes, const float *pair_numbers, float *pair_sums, float *parts, T *dk, T *dv,
                     const uint32_t *subtree_end, const Walks &walks, const GradientSizes &sizes) {
    const GradientMemory memory;
    const Walk walk(walks, sizes);
    if (threadIdx.x == 0) {
        memory.make();
    }
    if (threadIdx.x < PAIRS) {
        clear_rest(memory, sizes.group);
        reinterpret_cast<uint32_t *>(shared_memory() + memory.ROW_OF)[threadIdx.x] = threadIdx.x / sizes.group;
    }
    // The barriers and the cleared rows.
    publish();
    __syncthreads();
    if (threadIdx.x >= DIFFERENTIATORS) {
        shrink<FETCHER_REGISTERS>();
        if (threadIdx.x < DIFFERENTIATORS + FETCHERS) {
            fetch(boxes, pair_numbers, walk, sizes);
        }
        return;
    }
    grow<DIFFERENTIATOR_REGISTERS>();
    Walker<T> walker(walk, subtree_end, sizes);
    walker.run(pair_sums);
    Floats *part = nullptr;
    if (walk.part) {
        part = reinterpret_cast<Floats *>(parts) + (uint64_t(walk.part - 1) * sizes.kv_heads + walk.kv_head) * KEY_SUMS / 2;
    }
    const KeyRows<T> dk_rows(dk, walk.first_key, walk.kv_head, sizes), dv_rows(dv, walk.first_key, walk.kv_head, sizes);
#pragma unroll
    for (int n = 0; n < GRADIENT_DIM / 8; ++n) {
        const float(&own_dk)[4] = walker.dk[n], (&own_dv)[4] = walker.dv[n];
        const Floats dk_sums = {{own_dk[0], own_dk[1], own_dk[2], own_dk[3]}};
        const Floats dv_sums = {{own_dv[0], own_dv[1], own_dv[2], own_dv[3]}};
        if (part) {
            part[n * DIFFERENTIATORS + threadIdx.x] = dk_sums;
            part[KEY_SUMS / 4 + n * DIFFERENTIATORS + threadIdx.x] = dv_sums;
        } else {
            dk_rows.write(n, dk_sums, sizes.scale);
            dv_rows.write(n, dv_sums, 1);
        }
    }
}

} // namespace

// Kernels NAME_begin, of steps times key heads of 4 * PAIRS threads; NAME, of walks times key heads of GRADIENT_THREADS;
// NAME_end, of steps and split blocks times key heads of DIFFERENTIATORS.
#define TREE_GRADIENT_HOPPER(NAME, T)                                                                                \
    extern "C" __global__ void NAME##_begin(const T *out, const T *dout, const float *lse, float *pair_numbers,      \
                                            float *pair_sums, const __grid_constant__ GradientSizes sizes) {         \
        begin(out, dout, lse, pair_numbers, pair_sums, sizes);                                                       \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(GRADIENT_THREADS, 1)                                                \
        NAME(const __grid_constant__ CUtensorMap q_boxes, const __grid_constant__ CUtensorMap dout_boxes,            \
             const __grid_constant__ CUtensorMap k_boxes, const __grid_constant__ CUtensorMap v_boxes,               \
             const float *pair_numbers, float *pair_sums, float *parts, T *dk, T *dv, const uint32_t *subtree_end,   \
             const uint32_t *key_block, const uint32_t *first_step, const uint32_t *walk_end, const uint32_t *part,  \
             const __grid_constant__ GradientSizes sizes) {                                                          \
        const Walks walks = {key_block, first_step, walk_end, part};                                                 \
        const Boxes boxes = {q_boxes, dout_boxes, k_boxes, v_boxes};                                                 \
        walk(boxes, pair_numbers, pair_sums, parts, dk, dv, subtree_end, walks, sizes);                              \
    }                                                                                                                \
    extern "C" __global__ void NAME##_end(const float *pair_sums, const float *parts, const uint32_t *split_block,   \
                                          const uint32_t *first_part, T *dq, T *dk, T *dv,                           \
                                          const __grid_constant__ GradientSizes sizes) {                             \
        end(pair_sums, parts, split_block, first_part, dq, dk, dv, sizes);                                           \
    }
