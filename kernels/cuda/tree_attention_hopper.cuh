// Tree attention for GPUs of compute capability 9.0, on the tensor cores that read their factors from shared memory, in
// the manner of FlashAttention-3 (arXiv 2407.08608): see tree_attention.cuh.
//
// A block stays on its multiprocessor and computes one item, a tile of a key head, after the other. Two of its warps have
// the copy engine load, ahead of those that compute, and leave most registers to them. Each of three warpgroups has 64 of
// the tile's queries, and passes over blocks that none of them sees. While it computes the softmax of one key block, the
// tensor cores have its products of the block before with the values, or other warpgroups' products.
#pragma once

#include <hopper_load.cuh>
#include <launch.cuh>
#include <products.cuh>

namespace {

// The kernel begins with 128 registers a thread; all together these are as many.
constexpr int CONSUMER_REGISTERS = 160, LOADER_REGISTERS = 32;

// What one of the warpgroups that compute does with an item, whose blocks come from turn `at` on.
template <typename T, int HEAD_DIM> struct Computation {
    using Own = Queries<T, HEAD_DIM, 1, KEYS>;

    const Memory<HEAD_DIM> &memory;
    const Sizes &sizes;
    uint32_t turn, at, count, partials, first_row, last_row, own_q;
    Own own;
    typename Own::Scores scores;
    uint32_t weights[KEYS / 16][4];
    float factor[1][2];
    int passed[1][2], seen[1][2];

    __device__ Computation(const Memory<HEAD_DIM> &memory, const Given<T> &given, const Item &item, const Tile &tile,
                           uint32_t turn, uint32_t at)
        : memory(memory), sizes(given.sizes), turn(turn), at(at), count(same_for_warp(item.count)),
          // With a window, some query may see no block whole.
          partials(sizes.window ? count : same_for_warp(item.partial_count)), first_row(tile.row(warpgroup() * 64)),
          last_row(tile.row(warpgroup() * 64 + 63)), own_q(memory.q.memory + warpgroup() * 64 * 128),
          own(tile, given.depth, sizes) {}

    __device__ void run() {
        memory.q.await_full(turn);
        for (uint32_t i = next_seen(0); i < count; i = next_seen(i + 1)) {
            begin(i);
            while (i + 1 < partials && sees(i + 1)) {
                go_on(i++, true);
            }
            if (i + 1 >= partials) {
                // Most are whole: a loop that hides nothing.
                for (; i + 1 < count; ++i) {
                    memory.k.await_full(at + i + 1);
                    go_on(i, false);
                }
            }
            end(i);
        }
    }

    // The first block from `i` on that some of the queries see. Those before it go back unread. No product may be under
    // way: the loaders wait for its stage.
    __device__ uint32_t next_seen(uint32_t i) {
        for (; i < count && !sees(i); ++i) {
            emptied_keys(i);
            memory.v.await_full(at + i);
            memory.v.emptied(at + i);
        }
        return i;
    }

    // Its keys are there then.
    __device__ bool sees(uint32_t i) {
        memory.k.await_full(at + i);
        return i >= partials || same_for_warp(key_block(i).seen_among(first_row, last_row));
    }

    __device__ void begin(uint32_t i) {
        begin_products();
        begin_scores(i);
        prepare(i);
        wait_for_products<0>();
        settle(scores[0]);
        weigh(i, i < partials);
        memory.v.await_full(at + i);
        own.rescale(factor);
        pack();
    }

    // From a block to the next.
    __device__ void go_on(uint32_t i, bool is_partial) {
        settle(weights);
        settle(own.acc[0]);
        begin_products();
        begin_scores(i + 1);
        begin_values(i);
        if (is_partial) {
            prepare(i + 1);
        }
        wait_for_products<1>();
        settle(scores[0]);
        weigh(i + 1, is_partial);
        // Its branch keeps the compiler from waiting for the products before the softmax.
        memory.v.await_full(at + i + 1);
        wait_for_products<0>();
        settle(own.acc[0]);
        memory.v.emptied(at + i);
        own.rescale(factor);
        pack();
    }

    __device__ void end(uint32_t i) {
        settle(weights);
        settle(own.acc[0]);
        begin_products();
        begin_values(i);
        wait_for_products<0>();
        settle(own.acc[0]);
        memory.v.emptied(at + i);
    }

    __device__ const KeyBlock &key_block(uint32_t i) const {
        return *reinterpret_cast<const KeyBlock *>(shared_memory() + memory.block(at + i));
    }

    __device__ void emptied_keys(uint32_t i) {
        memory.k.emptied(at + i);
        if (i + 1 == count) {
            memory.q.emptied(turn);
        }
    }

    __device__ void begin_scores(uint32_t i) {
        multiply_panels<T, HEAD_DIM, TILE, KEYS>(scores[0], own_q, memory.k.stage(at + i));
        commit_products();
    }

    __device__ void begin_values(uint32_t i) {
        add_panels<T>(own.acc[0], weights, memory.v.stage(at + i));
        commit_products();
    }

    // While the scores are under way.
    __device__ void prepare(uint32_t i) {
        const KeyBlock &block = key_block(i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            seen[0][half] = block.seen(own.query[0][half]);
            passed[0][half] = sizes.window ? block.passed(own.query_depth[0][half], sizes.window) : 0;
        }
    }

    __device__ void weigh(uint32_t i, bool is_partial) {
        emptied_keys(i);
        if (sizes.softcap > 0) {
            own.cap(scores, sizes);
        }
        if (is_partial) {
            own.hide(scores, passed, seen);
        }
        own.weigh(scores, factor);
        // Before the next wait, not after it.
        settle(scores[0]);
        settle(factor);
    }

    __device__ void pack() {
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            own.pack(scores[0], step, weights[step]);
        }
    }
};

template <typename T, int HEAD_DIM> __device__ void compute(const Given<T> &given) {
    const Memory<HEAD_DIM> memory;
    uint32_t at = 0;
    for_items(memory, given, [&](uint32_t turn, const Item &item) {
        const Tile tile(given.sizes, given.tile(item.number), given.kv_head(item.number));
        Computation<T, HEAD_DIM> computation(memory, given, item, tile, turn, at);
        computation.run();
        at += computation.count;
        computation.own.write(given.out, given.lse, shared_memory() + memory.OUT, tile, given.sizes);
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
