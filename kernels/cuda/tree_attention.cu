// Tree attention for GPUs of compute capability 8.0 and later: see tree_attention.cuh.
//
// Each of four warps has 32 of the tile's queries, as two tiles of the tensor cores' m16n8k16. Keys of the next block come
// while the softmax of this one is computed, values while its scores are.

#include <tree_attention.cuh>

namespace {

constexpr int AMPERE_THREADS = 128;

template <typename T, int HEAD_DIM>
__device__ void ampere(const T *q, const T *k, const T *v, T *out, float *lse, const uint32_t *subtree_end,
                       const uint32_t *depth, const Tile &tile, const Blocks &blocks, const Sizes &given) {
    constexpr int THREADS = AMPERE_THREADS, PARTS = 2;
    const uint32_t q_memory = shared_address(shared_memory());
    const uint32_t k_memory = q_memory + TILE * HEAD_DIM * 2;
    const uint32_t v_memory = k_memory + KEYS * HEAD_DIM * 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    load_queries<T, HEAD_DIM, THREADS>(q_memory, q, tile, given);
    Queries<T, HEAD_DIM, PARTS> own(tile, depth, given);
    uint32_t next = blocks.count ? blocks.first_key(0) : 0;
    if (blocks.count) {
        load_keys<T, HEAD_DIM, THREADS>(k_memory, k, given.k_row, next, given.rows);
    }
    commit();
    for (uint32_t i = 0; i < blocks.count; ++i) {
        const uint32_t first = next;
        wait<0>();
        __syncthreads();
        load_keys<T, HEAD_DIM, THREADS>(v_memory, v, given.v_row, first, given.rows);
        commit();

        float scores[PARTS][KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; ++step) {
            uint32_t a[PARTS][4];
#pragma unroll
            for (int m = 0; m < PARTS; ++m) {
                const int row = 16 * (PARTS * warp + m) + lane % 16;
                load_matrices(a[m], address<TILE>(q_memory, row, 2 * step + lane / 16));
            }
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                uint32_t b[4];
                const int row = 16 * n + lane / 16 * 8 + lane % 8;
                load_matrices(b, address<KEYS>(k_memory, row, 2 * step + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < PARTS; ++m) {
                    multiply<T>(scores[m][2 * n], a[m], b[0], b[1]);
                    multiply<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

        wait<0>();
        __syncthreads();
        if (i + 1 < blocks.count) {
            next = blocks.first_key(i + 1);
            load_keys<T, HEAD_DIM, THREADS>(k_memory, k, given.k_row, next, given.rows);
        }
        commit();
        if (given.softcap > 0) {
            own.cap(scores, given);
        }
        if (i >= blocks.full_count || given.window) {
            own.mask(scores, first, subtree_end, depth, given);
        }
        own.weigh(scores);

#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            uint32_t a[PARTS][4];
#pragma unroll
            for (int m = 0; m < PARTS; ++m) {
                own.pack(scores[m], step, a[m]);
            }
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; ++n) {
                uint32_t b[4];
                load_transposed(b, address<KEYS>(v_memory, 16 * step + lane % 16, 2 * n + lane / 16));
#pragma unroll
                for (int m = 0; m < PARTS; ++m) {
                    multiply<T>(own.acc[m][2 * n], a[m], b[0], b[1]);
                    multiply<T>(own.acc[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
    wait<0>();
    __syncthreads();
    own.write(out, lse, shared_memory(), tile, given);
}

} // namespace

TREE_ATTENTIONS(tree_attention, ampere, AMPERE_THREADS, 2)
