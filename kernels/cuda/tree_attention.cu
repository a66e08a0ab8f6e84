// Tree attention for GPUs of compute capability 8.0 and later: see tree_attention.cuh.
//
// Each of four warps has 32 of the tile's queries, as two tiles of the tensor cores' m16n8k16. Keys of the next block come
// while the softmax of this one is computed, values while its scores are.

#include <launch.cuh>
#include <tree_attention.cuh>

namespace {

constexpr int AMPERE_THREADS = 128;
// Tiles of the tensor cores that a warp has.
constexpr int PARTS = 2;

// Those of one tile.
struct Blocks {
    const uint32_t *full, *partial;
    uint32_t full_count, count;

    __device__ Blocks(const Lists &lists, uint32_t tile)
        : full(lists.full_blocks + lists.full[tile]), partial(lists.partial_blocks + lists.partial[tile]),
          full_count(lists.full[tile + 1] - lists.full[tile]),
          count(full_count + lists.partial[tile + 1] - lists.partial[tile]) {}

    __device__ uint32_t first_key(uint32_t i) const {
        return KEYS * (i < full_count ? full[i] : partial[i - full_count]);
    }
};

template <typename T, int HEAD_DIM>
__device__ void load_queries(uint32_t to, const T *q, const Tile &tile, const Sizes &given) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    for (int at = threadIdx.x; at < TILE * CHUNKS; at += AMPERE_THREADS) {
        const uint32_t entry = at / CHUNKS, chunk = at % CHUNKS;
        const bool valid = entry < tile.entries;
        const T *source = q + (valid ? tile.row(entry) * given.q_row + tile.head(entry) * given.q_head : 0) + 8 * chunk;
        copy16(address<TILE>(to, entry, chunk), source, valid);
    }
}

// KEYS rows of keys or values.
template <typename T, int HEAD_DIM>
__device__ void load_keys(uint32_t to, const T *from, int64_t stride, uint32_t first, uint32_t rows) {
    constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / AMPERE_THREADS; ++i) {
        const uint32_t at = i * AMPERE_THREADS + threadIdx.x;
        const uint32_t row = at / CHUNKS, chunk = at % CHUNKS;
        const bool valid = first + row < rows;
        const T *source = from + (valid ? int64_t(first + row) * stride : 0) + 8 * chunk;
        copy16(address<KEYS>(to, row, chunk), source, valid);
    }
}

// Of keys from `first` on.
template <typename Q>
__device__ void mask(float (&scores)[PARTS][KEYS / 8][4], const Q &own, uint32_t first, const uint32_t *subtree_end,
                     const uint32_t *depth, const Sizes &given) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t key = first + 8 * n + threadIdx.x % 4 * 2 + j;
            const uint32_t end = key < given.rows ? __ldg(subtree_end + key) : 0;
            const uint32_t key_depth = given.window && key < given.rows ? __ldg(depth + key) : 0;
#pragma unroll
            for (int m = 0; m < PARTS; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t row = own.query[m][half];
                    const bool near = !given.window || own.query_depth[m][half] - key_depth < given.window;
                    if (!(key <= row && row < end && near)) {
                        scores[m][n][2 * half + j] = -INFINITY;
                    }
                }
            }
        }
    }
}

template <typename T, int HEAD_DIM>
__device__ void ampere(const T *q, const T *k, const T *v, T *out, float *lse, const uint32_t *subtree_end,
                       const uint32_t *depth, const Tile &tile, const Blocks &blocks, const Sizes &given) {
    const uint32_t q_memory = shared_address(shared_memory());
    const uint32_t k_memory = q_memory + TILE * HEAD_DIM * 2;
    const uint32_t v_memory = k_memory + KEYS * HEAD_DIM * 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    load_queries<T, HEAD_DIM>(q_memory, q, tile, given);
    Queries<T, HEAD_DIM, PARTS, KEYS> own(tile, depth, given);
    uint32_t next = blocks.count ? blocks.first_key(0) : 0;
    if (blocks.count) {
        load_keys<T, HEAD_DIM>(k_memory, k, given.k_row, next, given.rows);
    }
    commit();
    for (uint32_t i = 0; i < blocks.count; ++i) {
        const uint32_t first = next;
        wait<0>();
        __syncthreads();
        load_keys<T, HEAD_DIM>(v_memory, v, given.v_row, first, given.rows);
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
            load_keys<T, HEAD_DIM>(k_memory, k, given.k_row, next, given.rows);
        }
        commit();
        if (given.softcap > 0) {
            own.cap(scores, given);
        }
        if (i >= blocks.full_count || given.window) {
            mask(scores, own, first, subtree_end, depth, given);
        }
        float factor[PARTS][2];
        own.weigh(scores, factor);
        own.rescale(factor);

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

// The kernel NAME. `lse` is null where nobody wants it, `depth` [rows] where there is no window.
#define TREE_ATTENTION(NAME, T, HEAD_DIM)                                                                            \
    extern "C" __global__ void __launch_bounds__(AMPERE_THREADS, 2)                                                  \
        NAME(const T *q, const T *k, const T *v, T *out, float *lse, const uint32_t *subtree_end,                    \
             const uint32_t *depth, const uint32_t *full, const uint32_t *full_blocks, const uint32_t *partial,      \
             const uint32_t *partial_blocks, const __grid_constant__ Sizes given) {                                  \
        await_previous();                                                                                            \
        const Lists lists = {full, full_blocks, partial, partial_blocks};                                            \
        /* The last tiles have the longest lists: they come first. */                                                \
        const uint32_t tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y;                                      \
        ampere<T, HEAD_DIM>(q, k + kv_head * given.k_head, v + kv_head * given.v_head, out, lse, subtree_end, depth, \
                            Tile(given, tile, kv_head), Blocks(lists, tile), given);                                 \
    }

TREE_ATTENTION(tree_attention_f16_64, __half, 64)
TREE_ATTENTION(tree_attention_f16_128, __half, 128)
TREE_ATTENTION(tree_attention_bf16_64, __nv_bfloat16, 64)
TREE_ATTENTION(tree_attention_bf16_128, __nv_bfloat16, 128)
