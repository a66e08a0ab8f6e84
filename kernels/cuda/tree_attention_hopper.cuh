// Tree attention for GPUs of compute capability 9.0, on the tensor cores that read their factors from shared memory, in
// the manner of FlashAttention-3 (arXiv 2407.08608): see tree_attention.cuh.
//
// A block stays on its multiprocessor and computes one item, a tile of a key head, after the other. Two of its warps have
// the copy engine load, ahead of those that compute, and leave most registers to them. Each of three warpgroups has 64 of
// the tile's queries. While it computes the softmax of one key block, the tensor cores have its products of the block
// before with the values, or other warpgroups' products.
#pragma once

#include <hopper_load.cuh>
#include <launch.cuh>
#include <products.cuh>

namespace {

// The kernel begins with 128 registers a thread; all together these are as many.
constexpr int CONSUMER_REGISTERS = 160, LOADER_REGISTERS = 32;

template <typename T, int HEAD_DIM> __device__ void compute(const Given<T> &given) {
    using Own = Queries<T, HEAD_DIM, 1, KEYS>;
    const Memory<HEAD_DIM> memory;
    const Sizes &sizes = given.sizes;
    const uint32_t own_q = memory.q.memory + warpgroup() * 64 * 128;
    uint32_t at = 0;
    for_items(memory, given, [&](uint32_t turn, const Item &item) {
        const Tile tile(sizes, given.tile(item.number), given.kv_head(item.number));
        const uint32_t count = same_for_warp(item.count);
        Own own(tile, given.depth, sizes);
        uint32_t weights[KEYS / 16][4];
        float factor[1][2];
        int passed[1][2], seen[1][2];
        typename Own::Scores scores;

        auto begin_scores = [&](uint32_t i) {
            multiply_panels<T, HEAD_DIM, TILE, KEYS>(scores[0], own_q, memory.k.stage(at + i));
            commit_products();
        };
        auto begin_values = [&](uint32_t i) {
            add_panels<T>(own.acc[0], weights, memory.v.stage(at + i));
            commit_products();
        };
        // While the scores are under way.
        auto prepare = [&](uint32_t i) {
            if (item.is_partial(i, sizes)) {
                const KeyBlock block = *reinterpret_cast<const KeyBlock *>(shared_memory() + memory.block(at + i));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    seen[0][half] = block.seen(own.query[0][half]);
                    passed[0][half] = sizes.window ? block.passed(own.query_depth[0][half], sizes.window) : 0;
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
                own.hide(scores, passed, seen);
            }
            own.weigh(scores, factor);
            // Before the next wait, not after it.
            settle(scores[0]);
            settle(factor);
        };
        auto pack = [&] {
#pragma unroll
            for (int step = 0; step < KEYS / 16; ++step) {
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
             const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap one_k,                       \
             const __grid_constant__ CUtensorMap one_v, T *out, float *lse, const uint32_t *depth,                   \
             const __grid_constant__ Lists lists, const __grid_constant__ Sizes given, uint32_t tiles,               \
             uint32_t items, uint32_t *next) {                                                                       \
        attend<T, HEAD_DIM>({q, k, v, one_k, one_v, out, lse, depth, lists, tiles, items, next, given});             \
    }
