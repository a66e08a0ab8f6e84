// Attention over a batch that is folded onto its prefix trie, in depth-first order: FlashAttention-2 (arXiv 2307.08691,
// algorithm 1) over lists of key blocks. Query row q sees key row k if and only if k <= q < subtree_end[k] and, with a
// window, depth[q] - depth[k] < window.
//
// A block of threads computes a tile of TILE queries: all query heads of one key head for TILE / group rows, so that a key
// or value is read once for the whole group. This is what the kernels for all GPUs and for Hopper have in common: how a
// tile's rows come and go, and a warp's part of the softmax.
#pragma once

#include <cstdint>
#include <half.cuh>
#include <warp.cuh>

namespace {

constexpr int TILE = 128;
constexpr int KEYS = 64;
constexpr float LOG2_E = 1.4426950408889634f;

// What src/tree_attention.rs calls by the same name. Strides are elements from row to row and from head to head; the
// output is contiguous. `window` and `softcap` are 0 where there is none.
struct Sizes {
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    uint32_t rows, heads, group, window;
    float scale, softcap;
};

// Key blocks for each tile, those seen whole and those seen in part: lists between [tiles + 1] offsets.
struct Lists {
    const uint32_t *full, *full_blocks, *partial, *partial_blocks;
};

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

// The queries of one tile: entry e is head e % group, of those of the key head, of row e / group.
struct Tile {
    uint32_t group, first_row, first_head, entries, rows;

    __device__ Tile(const Sizes &given, uint32_t tile, uint32_t kv_head)
        : group(given.group), first_row(tile * (TILE / group)), first_head(kv_head * group),
          entries(min((given.rows - first_row) * group, TILE / group * group)), rows(given.rows) {}

    __device__ uint32_t row(uint32_t entry) const { return first_row + entry / group; }
    __device__ uint32_t head(uint32_t entry) const { return first_head + entry % group; }
};

// Where a row's chunk of 16 bytes is in shared memory, of a matrix of ROWS rows that starts at `base`, a multiple of 1024.
// Columns are in panels of 64, 128 bytes a row; chunks are permuted by the row's number, so that eight rows' chunks of one
// column lie in different banks. The tensor cores' descriptors call this a swizzle of 128 bytes.
template <int ROWS> __device__ uint32_t address(uint32_t base, uint32_t row, uint32_t chunk) {
    return base + 128 * (chunk / 8 * ROWS + row) + 16 * (chunk % 8 ^ row % 8);
}

template <typename T, int HEAD_DIM, int THREADS>
__device__ void load_queries(uint32_t to, const T *q, const Tile &tile, const Sizes &given) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    for (int at = threadIdx.x; at < TILE * CHUNKS; at += THREADS) {
        const uint32_t entry = at / CHUNKS, chunk = at % CHUNKS;
        const bool valid = entry < tile.entries;
        const T *source = q + (valid ? tile.row(entry) * given.q_row + tile.head(entry) * given.q_head : 0) + 8 * chunk;
        copy16(address<TILE>(to, entry, chunk), source, valid);
    }
}

// KEYS rows of keys or values.
template <typename T, int HEAD_DIM, int THREADS>
__device__ void load_keys(uint32_t to, const T *from, int64_t stride, uint32_t first, uint32_t rows) {
    constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / THREADS; ++i) {
        const uint32_t at = i * THREADS + threadIdx.x;
        const uint32_t row = at / CHUNKS, chunk = at % CHUNKS;
        const bool valid = first + row < rows;
        const T *source = from + (valid ? int64_t(first + row) * stride : 0) + 8 * chunk;
        copy16(address<KEYS>(to, row, chunk), source, valid);
    }
}

__device__ float maximum_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// A thread's part of 16 * PARTS queries of its warp: in each of the PARTS tiles of the tensor cores, rows lane / 4 and
// lane / 4 + 8, and of these columns lane % 4 * 2 and the next of every eight.
template <typename T, int HEAD_DIM, int PARTS> struct Queries {
    using Scores = float[PARTS][KEYS / 8][4];

    uint32_t query[PARTS][2], query_depth[PARTS][2];
    float peak[PARTS][2], total[PARTS][2], acc[PARTS][HEAD_DIM / 8][4];
    // Scores are kept as the products are: this brings them to the base of exp2, in the same instruction as the difference
    // from the peak. Capped scores are brought there by the cap.
    float unit;

    static __device__ uint32_t entry(int part, int half) {
        return 16 * (PARTS * (threadIdx.x / 32) + part) + 8 * half + threadIdx.x % 32 / 4;
    }

    __device__ Queries(const Tile &tile, const uint32_t *depth, const Sizes &given) : acc{} {
        unit = given.softcap > 0 ? 1 : given.scale * LOG2_E;
#pragma unroll
        for (int m = 0; m < PARTS; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                query[m][half] = tile.row(entry(m, half));
                const bool valid = given.window && query[m][half] < given.rows;
                query_depth[m][half] = valid ? depth[query[m][half]] : 0;
                peak[m][half] = -INFINITY;
                total[m][half] = 0;
            }
        }
    }

    __device__ void cap(Scores &scores, const Sizes &given) const {
#pragma unroll
        for (int m = 0; m < PARTS; ++m) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float share = scores[m][n][i] * given.scale / given.softcap;
                    scores[m][n][i] = given.softcap * LOG2_E * tanhf(share);
                }
            }
        }
    }

    // Of keys from `first` on.
    __device__ void mask(Scores &scores, uint32_t first, const uint32_t *subtree_end, const uint32_t *depth,
                         const Sizes &given) const {
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
                        const uint32_t row = query[m][half];
                        const bool near = !given.window || query_depth[m][half] - key_depth < given.window;
                        if (!(key <= row && row < end && near)) {
                            scores[m][n][2 * half + j] = -INFINITY;
                        }
                    }
                }
            }
        }
    }

    // From scores to weights; what there is so far is brought to the new peak.
    __device__ void weigh(Scores &scores) {
#pragma unroll
        for (int m = 0; m < PARTS; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float highest = peak[m][half];
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
                    highest = fmaxf(highest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                }
                highest = maximum_of_quad(highest);
                // A query that has seen nothing yet has no difference to take.
                const float shift = highest == -INFINITY ? 0 : highest * unit;
                const float factor = power_of_two(peak[m][half] * unit - shift);
                peak[m][half] = highest;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float &score = scores[m][n][2 * half + j];
                        score = power_of_two(score * unit - shift);
                        sum += score;
                    }
                }
                total[m][half] = total[m][half] * factor + sum;
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; ++n) {
                    acc[m][n][2 * half] *= factor;
                    acc[m][n][2 * half + 1] *= factor;
                }
            }
        }
    }

    // The weights of keys 16 * step and the next 15 as the tensor cores take a left factor.
    static __device__ void pack(const float (&weights)[KEYS / 8][4], int step, uint32_t (&to)[4]) {
        const float(&low)[4] = weights[2 * step], (&high)[4] = weights[2 * step + 1];
        to[0] = Half<T>::pack(low[0], low[1]);
        to[1] = Half<T>::pack(low[2], low[3]);
        to[2] = Half<T>::pack(high[0], high[1]);
        to[3] = Half<T>::pack(high[2], high[3]);
    }

    // Through `memory`, a tile of the warps' own rows, so that 16 bytes are written at a time. `lse` [heads, rows] is null
    // where nobody wants it.
    __device__ void write(T *out, float *lse, uint8_t *memory, const Tile &tile, const Sizes &given) const {
        constexpr int CHUNKS = HEAD_DIM / 8;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < PARTS; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t at = entry(m, half);
                const float sum = sum_of_quad(total[m][half]);
                const float inverse = sum > 0 ? 1 / sum : 0;
#pragma unroll
                for (int n = 0; n < CHUNKS; ++n) {
                    uint32_t *to = reinterpret_cast<uint32_t *>(memory + address<TILE>(0, at, n)) + lane % 4;
                    *to = Half<T>::pack(acc[m][n][2 * half] * inverse, acc[m][n][2 * half + 1] * inverse);
                }
                if (lse && at < tile.entries && lane % 4 == 0) {
                    const float logarithm = (peak[m][half] * unit + log2f(sum)) / LOG2_E;
                    lse[uint64_t(tile.head(at)) * given.rows + tile.row(at)] = logarithm;
                }
            }
        }
        __syncwarp();
        for (int i = lane; i < 16 * PARTS * CHUNKS; i += 32) {
            const uint32_t at = 16 * PARTS * (threadIdx.x / 32) + i / CHUNKS, chunk = i % CHUNKS;
            if (at < tile.entries) {
                const uint4 value = *reinterpret_cast<const uint4 *>(memory + address<TILE>(0, at, chunk));
                T *to = out + (uint64_t(tile.row(at)) * given.heads + tile.head(at)) * HEAD_DIM + 8 * chunk;
                *reinterpret_cast<uint4 *>(to) = value;
            }
        }
    }
};

} // namespace

// The kernel NAME, of THREADS threads of which BLOCKS are on a multiprocessor, that calls COMPUTE<T, HEAD_DIM> for a tile and
// a key head. `lse` is null where nobody wants it, `depth` [rows] where there is no window.
#define TREE_ATTENTION(NAME, COMPUTE, T, HEAD_DIM, THREADS, BLOCKS)                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                    \
        NAME(const T *q, const T *k, const T *v, T *out, float *lse, const uint32_t *subtree_end,                    \
             const uint32_t *depth, const uint32_t *full, const uint32_t *full_blocks, const uint32_t *partial,      \
             const uint32_t *partial_blocks, const __grid_constant__ Sizes given) {                                  \
        const Lists lists = {full, full_blocks, partial, partial_blocks};                                            \
        /* The last tiles have the longest lists: they come first. */                                                \
        const uint32_t tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y;                                      \
        COMPUTE<T, HEAD_DIM>(q, k + kv_head * given.k_head, v + kv_head * given.v_head, out, lse, subtree_end,       \
                             depth, Tile(given, tile, kv_head), Blocks(lists, tile), given);                         \
    }

// For every dtype and head_dim: PREFIX_f16_64 and so on.
#define TREE_ATTENTIONS(PREFIX, COMPUTE, THREADS, BLOCKS)                                                            \
    TREE_ATTENTION(PREFIX##_f16_64, COMPUTE, __half, 64, THREADS, BLOCKS)                                            \
    TREE_ATTENTION(PREFIX##_f16_128, COMPUTE, __half, 128, THREADS, BLOCKS)                                          \
    TREE_ATTENTION(PREFIX##_bf16_64, COMPUTE, __nv_bfloat16, 64, THREADS, BLOCKS)                                    \
    TREE_ATTENTION(PREFIX##_bf16_128, COMPUTE, __nv_bfloat16, 128, THREADS, BLOCKS)
