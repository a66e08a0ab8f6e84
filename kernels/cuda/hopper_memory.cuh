// What the roles of a block share in tree_attention_hopper.cuh: its shared memory, with the barriers by which keys,
// values and items are handed over, and the items that it computes.
#pragma once

#include <ring.cuh>
#include <tree_attention.cuh>

namespace {

// Three warpgroups compute; of a fourth, which must be whole to give up registers, a warp loads queries and keys, and one
// loads values.
constexpr int CONSUMERS = 384, LOADERS = 32, HOPPER_THREADS = CONSUMERS + 128;
// How many key blocks are in shared memory at once.
constexpr int STAGES = 4;

// A tile of a key head, where its lists begin, and how long the first and both are.
struct Item {
    uint32_t number, partial, partial_count, full, count;
};

template <int HEAD_DIM> struct Memory {
    static constexpr uint32_t TILE_BYTES = TILE * HEAD_DIM * 2, STAGE = KEYS * HEAD_DIM * 2;
    static constexpr uint32_t Q = 0, OUT = Q + TILE_BYTES, K = OUT + TILE_BYTES, V = K + STAGES * STAGE;
    // What is known of the blocks.
    static constexpr uint32_t BLOCKS = V + STAGES * STAGE;
    static constexpr uint32_t Q_BARRIERS = BLOCKS + STAGES * sizeof(KeyBlock), ITEM_BARRIERS = Q_BARRIERS + 16;
    static constexpr uint32_t K_BARRIERS = ITEM_BARRIERS + 16, V_BARRIERS = K_BARRIERS + 16 * STAGES;
    static constexpr uint32_t ITEM = V_BARRIERS + 16 * STAGES, BYTES = ITEM + 32;
    static_assert(BYTES == (2 * TILE + 8 * KEYS) * HEAD_DIM * 2 + 256, "what src/cuda/attention.rs asks for");

    uint32_t base = shared_address(shared_memory());
    Ring<1> q{base + Q, base + Q_BARRIERS, TILE_BYTES}, item{base + ITEM, base + ITEM_BARRIERS, 0};
    Ring<STAGES> k{base + K, base + K_BARRIERS, STAGE}, v{base + V, base + V_BARRIERS, STAGE};

    __device__ void make() const {
        q.make(1, CONSUMERS);
        item.make(1, CONSUMERS + 2 * LOADERS);
        k.make(1, CONSUMERS);
        v.make(1, CONSUMERS);
    }
    // Where it is, from the beginning on.
    static __device__ uint32_t block(uint32_t at) { return BLOCKS + at % STAGES * sizeof(KeyBlock); }
    static __device__ volatile Item &announced() { return *reinterpret_cast<volatile Item *>(shared_memory() + ITEM); }

    // The item that the loader of keys has announced, the at-th.
    __device__ Item take(uint32_t at) const {
        item.await_full(at);
        const volatile Item &next = announced();
        const Item taken = {next.number, next.partial, next.partial_count, next.full, next.count};
        item.emptied(at);
        return taken;
    }
};

// What is the same for all roles. The maps' boxes have 64 columns of a tile's queries, of a block's keys or values, of one
// key or value. `next` is how many items were asked for, beside the first of each block.
template <typename T> struct Given {
    const CUtensorMap &q, &k, &v, &one_k, &one_v;
    T *out;
    float *lse;
    const uint32_t *depth;
    Lists lists;
    uint32_t tiles, items;
    uint32_t *next;
    const Sizes &sizes;

    // The last tiles have the longest lists: they come first. A tile's heads follow each other, as their keys do in
    // memory.
    __device__ uint32_t tile(uint32_t item) const { return tiles - 1 - item / (items / tiles); }
    __device__ uint32_t kv_head(uint32_t item) const { return item % (items / tiles); }

    __device__ Item item(uint32_t number) const {
        if (number >= items) {
            return {number, 0, 0, 0, 0};
        }
        const uint32_t at = tile(number), partial = lists.partial[at], full = lists.full[at];
        const uint32_t partial_count = lists.partial[at + 1] - partial;
        return {number, partial, partial_count, full, partial_count + lists.full[at + 1] - full};
    }
    __device__ const KeyBlock *block(const Item &item, uint32_t i) const {
        const uint32_t *number = i < item.partial_count ? lists.partial_blocks + item.partial + i
                                                        : lists.full_blocks + item.full + i - item.partial_count;
        return lists.blocks + *number;
    }
};

// Calls work(at, item) for each item of this block. One thread asks for the next while the block computes this one.
template <int HEAD_DIM, typename T, typename W>
__device__ void for_items(const Memory<HEAD_DIM> &memory, const Given<T> &given, W work) {
    Item item = given.item(blockIdx.x);
    for (uint32_t at = 0; item.number < given.items; ++at) {
        const bool announces = threadIdx.x == CONSUMERS;
        uint32_t next = 0;
        if (announces) {
            next = gridDim.x + atomicAdd(given.next, 1);
        }
        work(at, item);
        if (announces) {
            const Item announced = given.item(next);
            memory.item.await_empty(at);
            volatile Item &to = memory.announced();
            to.number = announced.number, to.partial = announced.partial, to.partial_count = announced.partial_count;
            to.full = announced.full, to.count = announced.count;
            arrive(memory.item.full(at));
        }
        item = memory.take(at);
    }
}

} // namespace
