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

// Of the keys of the at-th step, by LOADERS threads: where their subtrees end and, with a window, how deep they are.
template <typename T, int HEAD_DIM>
__device__ void load_numbers(const Memory<HEAD_DIM> &memory, uint32_t at, const Given<T> &given,
                             const uint32_t (&first)[BLOCKS]) {
    const uint32_t to = memory.base + memory.numbers(at);
#pragma unroll
    for (int i = 0; i < STEP / LOADERS; ++i) {
        const uint32_t own = i * LOADERS + threadIdx.x % LOADERS, key = first[i * LOADERS / KEYS] + own % KEYS;
        const bool valid = key < given.sizes.rows;
        copy4(to + 4 * own, given.subtree_end + key, valid);
        if (given.sizes.window) {
            copy4(to + memory.DEPTHS + 4 * own, given.depth + key, valid);
        }
    }
}

// Of keys, with the queries before, or of values. The first lane has the copy engine bring them. Copies arrive at their
// barriers by themselves: nobody waits for them here.
template <typename T, int HEAD_DIM, bool ARE_KEYS> __device__ void load(const Given<T> &given) {
    const Memory<HEAD_DIM> memory;
    const Ring<STAGES> ring = ARE_KEYS ? memory.k : memory.v;
    const CUtensorMap &map = ARE_KEYS ? given.k : given.v;
    const Sizes &sizes = given.sizes;
    const uint32_t lane = threadIdx.x % LOADERS;
    uint32_t at = 0;
    for_items(memory, given, [&](uint32_t turn, const Item &item) {
        const uint32_t kv_head = given.kv_head(item.number);
        auto number = [&](uint32_t i) {
            return i < item.full_count ? given.lists.full_blocks + item.full + i
                                       : given.lists.partial_blocks + item.partial + i - item.full_count;
        };
        // The first keys of a step's blocks, behind all rows where there is no such block.
        uint32_t first[BLOCKS];
        auto find = [&](uint32_t i) {
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
                const uint32_t at = BLOCKS * i + block;
                first[block] = at < item.count ? KEYS * *number(at) : sizes.rows;
            }
        };
        find(0);
        if (ARE_KEYS) {
            memory.q.await_empty(turn);
            if (lane == 0) {
                const Tile tile(sizes, given.tile(item.number), kv_head);
                arrive_expecting(memory.q.full(turn), TILE / sizes.group * sizes.group * HEAD_DIM * 2);
                copy_columns<HEAD_DIM>(memory.q.memory, TILE, given.q, tile.first_head, tile.first_row,
                                       memory.q.full(turn));
            }
        }
        const uint32_t count = steps(item.count);
        for (uint32_t i = 0; i < count; ++i, ++at) {
            ring.await_empty(at);
            if (lane == 0) {
                arrive_expecting(ring.full(at), ring.bytes);
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    copy_columns<HEAD_DIM>(ring.stage(at) + block * KEYS * 128, STEP, map, kv_head, first[block],
                                           ring.full(at));
                }
            }
            if (ARE_KEYS) {
                if (item.is_partial(i, sizes)) {
                    load_numbers(memory, at, given, first);
                    const uint32_t block = BLOCKS * i + lane;
                    if (lane < BLOCKS) {
                        const uint32_t to = memory.base + memory.numbers(at) + memory.NUMBERS_OF_BLOCKS + 4 * lane;
                        copy4(to, number(block), block < item.count);
                    }
                }
                arrive_copied(ring.full(at));
            }
            // Before the wait for an empty stage, so that they are there after it.
            find(i + 1);
        }
    });
    // A thread must not end before its copies.
    wait_for_all();
}

} // namespace
