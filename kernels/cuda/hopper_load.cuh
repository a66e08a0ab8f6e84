// The roles that load in tree_attention_hopper.cu.
#pragma once

#include <hopper_memory.cuh>

namespace {

// Rows of a step's keys or values, by LOADERS threads.
template <typename T, int HEAD_DIM>
__device__ void load_step(uint32_t to, const T *from, int64_t stride, const uint32_t (&first)[BLOCKS], uint32_t rows) {
    constexpr int CHUNKS = HEAD_DIM / 8, EACH = LOADERS / CHUNKS, PHASES = 8 / EACH;
    const uint32_t own = threadIdx.x % LOADERS / CHUNKS, chunk = threadIdx.x % CHUNKS;
    // Eight rows on, the permutation is the same.
    uint32_t place[PHASES];
#pragma unroll
    for (int phase = 0; phase < PHASES; ++phase) {
        place[phase] = address<STEP>(to, phase * EACH + own, chunk);
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        const int left = rows - first[block] - own;
        const T *source = from + int64_t(first[block] + own) * stride + 8 * chunk;
#pragma unroll
        for (int i = 0; i < KEYS / EACH; ++i) {
            copy16(place[i % PHASES] + 128 * (block * KEYS + i / PHASES * 8), source, i * EACH < left);
            source += EACH * stride;
        }
    }
}

template <typename T, int HEAD_DIM>
__device__ void load_tile(uint32_t to, const T *q, const Tile &tile, const Sizes &sizes) {
    constexpr int CHUNKS = HEAD_DIM / 8, EACH = LOADERS / CHUNKS;
    const uint32_t chunk = threadIdx.x % CHUNKS;
    Entries<EACH> own(tile, threadIdx.x % LOADERS / CHUNKS);
#pragma unroll 4
    for (int i = 0; i < TILE / EACH; ++i) {
        const T *source = q + own.row * sizes.q_row + own.head * sizes.q_head + 8 * chunk;
        copy16(address<TILE>(to, own.entry, chunk), source, own.valid());
        own.advance();
    }
}

// Of keys, with the queries before, or of values. Copies arrive at their barriers by themselves: nobody waits for them
// here.
template <typename T, int HEAD_DIM, bool ARE_KEYS> __device__ void load(const Given<T> &given) {
    const Memory<HEAD_DIM> memory;
    const Ring<STAGES> ring = ARE_KEYS ? memory.k : memory.v;
    const Sizes &sizes = given.sizes;
    const uint32_t lane = threadIdx.x % LOADERS;
    uint32_t at = 0;
    for_items(memory, given, [&](uint32_t turn, const Item &item) {
        const uint32_t tile = given.tile(item.number), kv_head = given.kv_head(item.number);
        const T *from = ARE_KEYS ? given.k + kv_head * sizes.k_head : given.v + kv_head * sizes.v_head;
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
            load_tile<T, HEAD_DIM>(memory.q.memory, given.q, Tile(sizes, tile, kv_head), sizes);
            arrive_copied(memory.q.full(turn));
        }
        const uint32_t count = steps(item.count);
        for (uint32_t i = 0; i < count; ++i, ++at) {
            ring.await_empty(at);
            if (ARE_KEYS) {
                const uint32_t to = memory.base + memory.numbers(at);
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    const uint32_t key = first[block] + lane, place = to + 4 * (block * KEYS + lane);
                    copy4(place, given.subtree_end + key, key < sizes.rows);
                    if (sizes.window) {
                        copy4(place + memory.DEPTHS, given.depth + key, key < sizes.rows);
                    }
                    if (lane == 0) {
                        const uint32_t at = BLOCKS * i + block;
                        copy4(to + memory.NUMBERS_OF_BLOCKS + 4 * block, number(at), at < item.count);
                    }
                }
            }
            load_step<T, HEAD_DIM>(ring.stage(at), from, ARE_KEYS ? sizes.k_row : sizes.v_row, first, sizes.rows);
            arrive_copied(ring.full(at));
            // Before the wait for an empty stage, so that they are there after it.
            find(i + 1);
        }
    });
    // A thread must not end before its copies.
    wait_for_all();
}

} // namespace
