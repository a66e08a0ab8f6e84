// Tree attention for GPUs of compute capability 9.0, on the tensor cores that read their factors from shared memory, in
// the manner of FlashAttention-3 (arXiv 2407.08608): see tree_attention.cuh.
//
// A block stays on its multiprocessor and computes one item, a tile of a key head, after the other. Two of its warps have
// the copy engine load, ahead of those that compute, and leave most registers to them. Each of two warpgroups has 64 of
// the tile's queries. While it computes the softmax of one step of keys, the tensor cores have its products of the step
// before with the values, or the other warpgroup's products.
#pragma once

#include <hopper_load.cuh>
#include <launch.cuh>
#include <products.cuh>

namespace {

// The kernel begins with 168 registers a thread; all together these are as many.
constexpr int CONSUMER_REGISTERS = 232, LOADER_REGISTERS = 40;

// For which of a step's keys the scores of a thread's two queries do not count: key 8 * n + lane % 4 * 2 + j is bit
// 2 * n + j.
using Hidden = uint32_t[1][2];

// Of block `block` of a step, whose first key is `first`; its keys' `ends` of subtrees and `depths` are in shared
// memory.
template <typename Q>
__device__ void hide(Hidden &hidden, const Q &own, int block, uint32_t first, const uint8_t *ends,
                     const uint8_t *depths, const Sizes &given) {
#pragma unroll 4
    for (int n = 0; n < KEYS / 8; ++n) {
        const uint32_t at = 4 * n + threadIdx.x % 4;
        const uint2 pair = reinterpret_cast<const uint2 *>(ends)[at];
        const uint2 pair_depths = given.window ? reinterpret_cast<const uint2 *>(depths)[at] : uint2{0, 0};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t key = first + 8 * n + threadIdx.x % 4 * 2 + j;
            const uint32_t end = j ? pair.y : pair.x, key_depth = j ? pair_depths.y : pair_depths.x;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t row = own.query[0][half];
                const bool near = !given.window || own.query_depth[0][half] - key_depth < given.window;
                const bool seen = key <= row && row < end && near;
                hidden[0][half] |= uint32_t(!seen) << (KEYS / 4 * block + 2 * n + j);
            }
        }
    }
}

__device__ void mask(float (&scores)[STEP / 8][4], const Hidden &hidden) {
#pragma unroll
    for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (hidden[0][i / 2] >> (2 * n + i % 2) & 1) {
                scores[n][i] = -INFINITY;
            }
        }
    }
}

template <typename T, int HEAD_DIM> __device__ void compute(const Given<T> &given) {
    using Own = Queries<T, HEAD_DIM, 1, STEP>;
    const Memory<HEAD_DIM> memory;
    const Sizes &sizes = given.sizes;
    const uint32_t warpgroup = threadIdx.x / 128;
    const uint32_t own_q = memory.q.memory + warpgroup * 64 * 128;
    uint32_t at = 0;
    for_items(memory, given, [&](uint32_t turn, const Item &item) {
        const Tile tile(sizes, given.tile(item.number), given.kv_head(item.number));
        const uint32_t count = steps(item.count);
        Own own(tile, given.depth, sizes);
        uint32_t weights[STEP / 16][4];
        float factor[1][2];
        Hidden hidden;
        typename Own::Scores scores;

        auto begin_scores = [&](uint32_t i) {
            multiply_panels<T, HEAD_DIM, TILE, STEP>(scores[0], own_q, memory.k.stage(at + i));
            commit_products();
        };
        auto begin_values = [&](uint32_t i) {
            add_panels<T>(own.acc[0], weights, memory.v.stage(at + i));
            commit_products();
        };
        // While the scores are under way.
        auto prepare = [&](uint32_t i) {
            if (item.is_partial(i, sizes)) {
                hidden[0][0] = hidden[0][1] = 0;
                for (int block = 0; block < BLOCKS; ++block) {
                    const uint8_t *numbers = shared_memory() + memory.numbers(at + i);
                    const uint8_t *blocks = numbers + memory.NUMBERS_OF_BLOCKS, *ends = numbers + 4 * KEYS * block;
                    const uint32_t first = KEYS * reinterpret_cast<const uint32_t *>(blocks)[block];
                    hide(hidden, own, block, first, ends, ends + memory.DEPTHS, sizes);
                }
            }
        };
        auto weigh = [&](uint32_t i) {
            memory.k.emptied(at + i);
            if (i + 1 == count) {
                memory.q.emptied(turn);
            }
            if (sizes.softcap > 0) {
                own.cap(scores, sizes);
            }
            if (item.is_partial(i, sizes)) {
                mask(scores[0], hidden);
            }
            own.weigh(scores, factor);
            // Before the next wait, not after it.
            settle(scores[0]);
            settle(factor);
        };
        auto pack = [&] {
#pragma unroll
            for (int step = 0; step < STEP / 16; ++step) {
                own.pack(scores[0], step, weights[step]);
            }
        };

        memory.q.await_full(turn);
        memory.k.await_full(at);
        begin_products();
        begin_scores(0);
        prepare(0);
        wait_for_products<0>();
        settle(scores[0]);
        weigh(0);
        pack();
        memory.v.await_full(at);
        for (uint32_t i = 0; i + 1 < count; ++i) {
            memory.k.await_full(at + i + 1);
            settle(weights);
            settle(own.acc[0]);
            begin_products();
            begin_scores(i + 1);
            begin_values(i);
            prepare(i + 1);
            wait_for_products<1>();
            settle(scores[0]);
            weigh(i + 1);
            // Its branch keeps the compiler from waiting for the products before the softmax.
            memory.v.await_full(at + i + 1);
            wait_for_products<0>();
            settle(own.acc[0]);
            memory.v.emptied(at + i);
            own.rescale(factor);
            pack();
        }
        settle(weights);
        settle(own.acc[0]);
        begin_products();
        begin_values(count - 1);
        wait_for_products<0>();
        settle(own.acc[0]);
        memory.v.emptied(at + count - 1);
        at += count;
        own.write(given.out, given.lse, shared_memory() + memory.OUT, tile, sizes);
        // The next item's output goes through the same memory.
        __syncwarp();
    });
}

template <typename T, int HEAD_DIM> __device__ void attend(const Given<T> &given) {
    const Memory<HEAD_DIM> memory;
    if (threadIdx.x == 0) {
        memory.make();
    }
    if (threadIdx.x < TILE) {
        clear_rest(memory, given.sizes.group);
    }
    // The barriers and the cleared rows.
    publish();
    await_previous();
    __syncthreads();
    if (threadIdx.x < CONSUMERS) {
        grow<CONSUMER_REGISTERS>();
        compute<T, HEAD_DIM>(given);
    } else {
        shrink<LOADER_REGISTERS>();
        if (threadIdx.x < CONSUMERS + LOADERS) {
            load<T, HEAD_DIM, true>(given);
        } else if (threadIdx.x < CONSUMERS + 2 * LOADERS) {
            load<T, HEAD_DIM, false>(given);
        }
    }
}

} // namespace

// The kernel NAME, of a block for each multiprocessor, but no more than `items`, which are `tiles` times key heads.
// `lse` is null where nobody wants it, `depth` [rows] where there is no window; `next` points to 0.
#define TREE_ATTENTION_HOPPER(NAME, T, HEAD_DIM)                                                                     \
    extern "C" __global__ void __launch_bounds__(HOPPER_THREADS, 1)                                                  \
        NAME(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,                           \
             const __grid_constant__ CUtensorMap v, T *out, float *lse, const uint32_t *subtree_end,                 \
             const uint32_t *depth, const uint32_t *full, const uint32_t *full_blocks, const uint32_t *partial,      \
             const uint32_t *partial_blocks, const __grid_constant__ Sizes given, uint32_t tiles, uint32_t items,    \
             uint32_t *next) {                                                                                       \
        const Lists lists = {full, full_blocks, partial, partial_blocks};                                            \
        attend<T, HEAD_DIM>({q, k, v, out, lse, subtree_end, depth, lists, tiles, items, next, given});              \
    }
