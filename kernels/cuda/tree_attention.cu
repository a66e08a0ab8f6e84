// Tree attention for GPUs of compute capability 8.0 and later: see tree_attention.cuh.
//
// Each of six warps has 32 of the tile's queries, as two tiles of the tensor cores' m16n8k16, and computes nothing of blocks
// that none of them sees. Keys of the next block come while the softmax of this one is computed, values while its scores
// are.

#include <launch.cuh>
#include <tree_attention.cuh>

namespace {

constexpr int AMPERE_THREADS = 192;
// Tiles of the tensor cores that a warp has.
constexpr int PARTS = 2;

template <typename T, int HEAD_DIM> using Own = Queries<T, HEAD_DIM, PARTS, KEYS>;

// Those of one tile.
struct Blocks {
    const KeyBlock *blocks;
    const uint32_t *above, *partial, *full;
    uint32_t partial_count, count;

    __device__ Blocks(const Lists &lists, uint32_t tile)
        : blocks(lists.blocks), above(lists.above), partial(lists.partial_blocks + lists.partial[tile]),
          full(lists.full_blocks + lists.full[tile]), partial_count(lists.partial[tile + 1] - lists.partial[tile]),
          count(partial_count + lists.full[tile + 1] - lists.full[tile]) {}

    __device__ KeyBlock at(uint32_t i) const {
        return blocks[i < partial_count ? partial[i] : full[i - partial_count]];
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

// A block's keys or values.
template <typename T, int HEAD_DIM>
__device__ void load_keys(uint32_t to, const T *from, int64_t stride, const KeyBlock &block, const uint32_t *above,
                          uint32_t rows) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    for (int at = threadIdx.x; at < KEYS * CHUNKS; at += AMPERE_THREADS) {
        const uint32_t place = at / CHUNKS, chunk = at % CHUNKS, row = block.row(place, above);
        const bool valid = row < rows;
        const T *source = from + (valid ? int64_t(row) * stride : 0) + 8 * chunk;
        copy16(address<KEYS>(to, place, chunk), source, valid);
    }
}

template <typename T, int HEAD_DIM>
__device__ void hide(float (&scores)[PARTS][KEYS / 8][4], const Own<T, HEAD_DIM> &own, const KeyBlock &block,
                     const Sizes &given) {
    int passed[PARTS][2], seen[PARTS][2];
#pragma unroll
    for (int m = 0; m < PARTS; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            seen[m][half] = block.seen(own.query[m][half]);
            passed[m][half] = given.window ? block.passed(own.query_depth[m][half], given.window) : 0;
        }
    }
    own.hide(scores, passed, seen);
}

// Of a warp's queries and the keys in shared memory.
template <typename T, int HEAD_DIM>
__device__ void multiply_keys(float (&scores)[PARTS][KEYS / 8][4], uint32_t q_memory, uint32_t k_memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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
}

// Adds the values in shared memory, times their weights.
template <typename T, int HEAD_DIM>
__device__ void add_values(Own<T, HEAD_DIM> &own, const float (&weights)[PARTS][KEYS / 8][4], uint32_t v_memory) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
        uint32_t a[PARTS][4];
#pragma unroll
        for (int m = 0; m < PARTS; ++m) {
            own.pack(weights[m], step, a[m]);
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

template <typename T, int HEAD_DIM>
__device__ void ampere(const T *q, const T *k, const T *v, T *out, float *lse, const uint32_t *depth, const Tile &tile,
                       const Blocks &blocks, const Sizes &given) {
    const uint32_t q_memory = shared_address(shared_memory());
    const uint32_t k_memory = q_memory + TILE * HEAD_DIM * 2;
    const uint32_t v_memory = k_memory + KEYS * HEAD_DIM * 2;
    const uint32_t first = 16 * PARTS * (threadIdx.x / 32);
    const uint32_t first_row = tile.row(first), last_row = tile.row(first + 16 * PARTS - 1);

    load_queries<T, HEAD_DIM>(q_memory, q, tile, given);
    Own<T, HEAD_DIM> own(tile, depth, given);
    KeyBlock next = blocks.at(0);
    load_keys<T, HEAD_DIM>(k_memory, k, given.k_row, next, blocks.above, given.rows);
    commit();
    for (uint32_t i = 0; i < blocks.count; ++i) {
        const KeyBlock block = next;
        // Whether some of the warp's queries see it.
        const bool see = block.seen_among(first_row, last_row);
        wait<0>();
        __syncthreads();
        load_keys<T, HEAD_DIM>(v_memory, v, given.v_row, block, blocks.above, given.rows);
        commit();
        float scores[PARTS][KEYS / 8][4] = {};
        if (see) {
            multiply_keys<T, HEAD_DIM>(scores, q_memory, k_memory);
        }

        wait<0>();
        __syncthreads();
        if (i + 1 < blocks.count) {
            next = blocks.at(i + 1);
            load_keys<T, HEAD_DIM>(k_memory, k, given.k_row, next, blocks.above, given.rows);
        }
        commit();
        if (!see) {
            continue;
        }
        if (given.softcap > 0) {
            own.cap(scores, given);
        }
        if (i < blocks.partial_count || given.window) {
            hide(scores, own, block, given);
        }
        float factor[PARTS][2];
        own.weigh(scores, factor);
        own.rescale(factor);
        add_values<T, HEAD_DIM>(own, scores, v_memory);
    }
    wait<0>();
    __syncthreads();
    own.write(out, lse, shared_memory(), tile, given);
}

} // namespace

// The kernel NAME. `lse` is null where nobody wants it, `depth` [rows] where there is no window.
#define TREE_ATTENTION(NAME, T, HEAD_DIM)                                                                            \
    extern "C" __global__ void __launch_bounds__(AMPERE_THREADS, 1)                                                  \
        NAME(const T *q, const T *k, const T *v, T *out, float *lse, const uint32_t *depth,                          \
             const __grid_constant__ Lists lists, const __grid_constant__ Sizes given) {                             \
        await_previous();                                                                                            \
        /* The last tiles have the longest lists: they come first. */                                                \
        const uint32_t tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y;                                      \
        ampere<T, HEAD_DIM>(q, k + kv_head * given.k_head, v + kv_head * given.v_head, out, lse, depth,              \
                            Tile(given, tile, kv_head), Blocks(lists, tile), given);                                 \
    }

TREE_ATTENTION(tree_attention_f16_64, __half, 64)
TREE_ATTENTION(tree_attention_f16_128, __half, 128)
TREE_ATTENTION(tree_attention_bf16_64, __nv_bfloat16, 64)
TREE_ATTENTION(tree_attention_bf16_128, __nv_bfloat16, 128)
