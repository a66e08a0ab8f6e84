// The roles that load in tree_attention_hopper.cuh.
#pragma once

#include <hopper_memory.cuh>

namespace {

// Rows of the tile's memory behind its entries, which no copy fills. By TILE threads.
template <int HEAD_DIM> __device__ void clear_rest(const Memory<HEAD_DIM> &memory, uint32_t group) {
    if (threadIdx.x >= TILE / group * group) {
        for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
            copy16(address<TILE>(memory.q.memory, threadIdx.x, chunk), nullptr, false);
        }
    }
    commit();
    wait<0>();
}

// The rows of a block to a stage, by LOADERS threads: all at once where they follow each other in the batch as well, else one
// by one.
template <int HEAD_DIM>
__device__ void load_block(uint32_t to, const CUtensorMap &map, const CUtensorMap &one, const KeyBlock &block,
                           const uint32_t *above, uint32_t kv_head, uint32_t barrier) {
    const uint32_t lane = threadIdx.x % LOADERS;
    if (block.shared() == 0) {
        if (lane == 0) {
            copy_columns<HEAD_DIM>(to, KEYS, map, kv_head, block.first, barrier);
        }
        return;
    }
    for (uint32_t place = lane; place < KEYS; place += LOADERS) {
        copy_columns<HEAD_DIM>(to + 128 * place, KEYS, one, kv_head, block.row(place, above), barrier);
    }
}

// Of keys, with the queries before, or of values.
template <typename T, int HEAD_DIM, bool ARE_KEYS> __device__ void load(const Given<T> &given) {
    const Memory<HEAD_DIM> memory;
    const Ring<STAGES> ring = ARE_KEYS ? memory.k : memory.v;
    const uint32_t lane = threadIdx.x % LOADERS;
    uint32_t at = 0;
    for_items(memory, given, [&](uint32_t turn, const Item &item) {
        const uint32_t kv_head = given.kv_head(item.number);
        if (ARE_KEYS) {
            memory.q.await_empty(turn);
            if (lane == 0) {
                const Tile tile(given.sizes, given.tile(item.number), kv_head);
                arrive_expecting(memory.q.full(turn), TILE / given.sizes.group * given.sizes.group * HEAD_DIM * 2);
                copy_columns<HEAD_DIM>(memory.q.memory, TILE, given.q, tile.first_head, tile.first_row,
                                       memory.q.full(turn));
            }
        }
        KeyBlock next = *given.block(item, 0);
        for (uint32_t i = 0; i < item.count; ++i, ++at) {
            const KeyBlock block = next;
            // Before the wait for an empty stage, so that it is there after it.
            if (i + 1 < item.count) {
                next = *given.block(item, i + 1);
            }
            ring.await_empty(at);
            if (lane == 0) {
                if (ARE_KEYS) {
                    *reinterpret_cast<KeyBlock *>(shared_memory() + memory.block(at)) = block;
                }
                arrive_expecting(ring.full(at), ring.bytes);
            }
            __syncwarp();
            load_block<HEAD_DIM>(ring.stage(at), ARE_KEYS ? given.k : given.v, ARE_KEYS ? given.one_k : given.one_v,
                                 block, given.lists.above, kv_head, ring.full(at));
        }
    });
}

} // namespace
