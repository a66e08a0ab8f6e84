// Tree attention for GPUs of compute capability 9.0, on the tensor cores that read their factors from shared memory: see
// tree_attention.cuh.
//
// Each of two warpgroups has 64 of the tile's queries. Keys and values are in two stages: those of the next block come while
// this one is computed. Two tiles share a multiprocessor, so that the tensor cores have one's products while the other's
// softmax is computed: that is faster than a tile alone with the registers to do both by itself.

#include <tree_attention.cuh>
#include <warpgroup.cuh>

namespace {

constexpr int HOPPER_THREADS = 256;

// scores = q k^T, of the warpgroup's queries and a block's keys.
template <typename T, int HEAD_DIM>
__device__ void multiply_keys(float (&scores)[KEYS / 8][4], uint32_t q_memory, uint32_t k_memory) {
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        const uint32_t panel = step / 4, column = 32 * (step % 4);
        const uint64_t queries = descriptor(q_memory + panel * TILE * 128 + column, 0);
        const uint64_t keys = descriptor(k_memory + panel * KEYS * 128 + column, 0);
        if (step) {
            multiply_rows<T, false>(scores, queries, keys);
        } else {
            multiply_rows<T, true>(scores, queries, keys);
        }
    }
}

// acc += weights v
template <typename T, int HEAD_DIM>
__device__ void multiply_values(float (&acc)[HEAD_DIM / 8][4], const uint32_t (&weights)[KEYS / 16][4], uint32_t v_memory) {
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
        multiply_columns<T>(acc, weights[step], descriptor(v_memory + 16 * step * 128, KEYS * 128));
    }
}

template <typename T, int HEAD_DIM>
__device__ void hopper(const T *q, const T *k, const T *v, T *out, float *lse, const uint32_t *subtree_end,
                       const uint32_t *depth, const Tile &tile, const Blocks &blocks, const Sizes &given) {
    constexpr int THREADS = HOPPER_THREADS, STAGE = KEYS * HEAD_DIM * 2;
    const uint32_t q_memory = shared_address(shared_memory());
    const uint32_t k_memory = q_memory + TILE * HEAD_DIM * 2;
    const uint32_t v_memory = k_memory + 2 * STAGE;
    const uint32_t own_q_memory = q_memory + threadIdx.x / 128 * 64 * 128;

    // Block i is in stage i % 2.
    auto fetch = [&](uint32_t memory, const T *from, int64_t stride, uint32_t i) {
        if (i < blocks.count) {
            const uint32_t to = memory + i % 2 * STAGE;
            load_keys<T, HEAD_DIM, THREADS>(to, from, stride, blocks.first_key(i), given.rows);
        }
    };
    load_queries<T, HEAD_DIM, THREADS>(q_memory, q, tile, given);
    fetch(k_memory, k, given.k_row, 0);
    fetch(v_memory, v, given.v_row, 0);
    commit();
    Queries<T, HEAD_DIM, 1> own(tile, depth, given);
    for (uint32_t i = 0; i < blocks.count; ++i) {
        wait<0>();
        publish();
        __syncthreads();
        fetch(k_memory, k, given.k_row, i + 1);
        fetch(v_memory, v, given.v_row, i + 1);
        commit();
        float scores[1][KEYS / 8][4];
        begin_products();
        multiply_keys<T, HEAD_DIM>(scores[0], own_q_memory, k_memory + i % 2 * STAGE);
        commit_products();
        wait_for_products();
        settle(scores[0]);
        if (given.softcap > 0) {
            own.cap(scores, given);
        }
        if (i >= blocks.full_count || given.window) {
            own.mask(scores, blocks.first_key(i), subtree_end, depth, given);
        }
        own.weigh(scores);
        uint32_t weights[KEYS / 16][4];
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            own.pack(scores[0], step, weights[step]);
        }
        settle(weights);
        settle(own.acc[0]);
        begin_products();
        multiply_values<T, HEAD_DIM>(own.acc[0], weights, v_memory + i % 2 * STAGE);
        commit_products();
        wait_for_products();
        settle(own.acc[0]);
    }
    wait<0>();
    __syncthreads();
    own.write(out, lse, shared_memory(), tile, given);
}

} // namespace

TREE_ATTENTIONS(tree_attention_hopper, hopper, HOPPER_THREADS, 2)
