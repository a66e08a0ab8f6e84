// Attention over a batch that is folded onto its prefix trie, in depth-first order: FlashAttention-2 (arXiv 2307.08691,
// algorithm 1) over lists of key blocks. Query row q sees key row k if and only if k <= q < subtree_end[k] and, with a
// window, depth[q] - depth[k] < window.
//
// A block of threads computes a tile of TILE queries: all query heads of one key head for TILE / group rows, so that a key
// or value is read once for the whole group. Each warp has 32 of the queries, as two tiles of the tensor cores' m16n8k16.
// Keys of the next block come while the softmax of this one is computed, values while its scores are.

#include <cstdint>
#include <half.cuh>
#include <warp.cuh>

namespace {

constexpr int TILE = 128;
constexpr int KEYS = 64;
constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
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

// Rows of HEAD_DIM elements of 2 bytes in shared memory, in chunks of 16 bytes. Chunks of a row are permuted by its
// number, so that eight rows' chunks of one column lie in different banks.
template <int HEAD_DIM> struct Rows {
    static constexpr int CHUNKS = HEAD_DIM / 8;
    static __device__ uint32_t address(uint32_t base, int row, int chunk) {
        return base + 16 * (row * CHUNKS + (chunk ^ (row & 7)));
    }
};

template <typename T, int HEAD_DIM>
__device__ void load_keys(uint32_t to, const T *from, int64_t stride, uint32_t first, uint32_t rows) {
    constexpr int CHUNKS = Rows<HEAD_DIM>::CHUNKS;
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / THREADS; ++i) {
        const int at = i * THREADS + threadIdx.x;
        const int row = at / CHUNKS, chunk = at % CHUNKS;
        const bool valid = first + row < rows;
        const T *source = from + (valid ? int64_t(first + row) * stride : 0) + 8 * chunk;
        copy16(Rows<HEAD_DIM>::address(to, row, chunk), source, valid);
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

// `lse` [heads, rows] is null where nobody wants it, `depth` [rows] where there is no window.
template <typename T, int HEAD_DIM>
__device__ void tree_attention(const T *q, const T *k, const T *v, T *out, float *lse, const uint32_t *subtree_end,
                               const uint32_t *depth, const Lists &lists, const Sizes &given) {
    using Tile = Rows<HEAD_DIM>;
    uint8_t *memory = shared_memory();
    const uint32_t q_memory = shared_address(memory);
    const uint32_t k_memory = q_memory + TILE * HEAD_DIM * 2;
    const uint32_t v_memory = k_memory + KEYS * HEAD_DIM * 2;

    // The last tiles have the longest lists: they come first.
    const uint32_t tile = gridDim.x - 1 - blockIdx.x;
    const uint32_t kv_head = blockIdx.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t tile_rows = TILE / given.group;
    const uint32_t first_row = tile * tile_rows;
    k += kv_head * given.k_head;
    v += kv_head * given.v_head;

    for (int at = threadIdx.x; at < TILE * Tile::CHUNKS; at += THREADS) {
        const uint32_t entry = at / Tile::CHUNKS, chunk = at % Tile::CHUNKS;
        const uint32_t row = first_row + entry / given.group, head = kv_head * given.group + entry % given.group;
        const bool valid = entry < tile_rows * given.group && row < given.rows;
        const T *source = q + (valid ? row * given.q_row + head * given.q_head : 0) + 8 * chunk;
        copy16(Tile::address(q_memory, entry, chunk), source, valid);
    }

    // Each thread has elements of four queries: of both of its warp's tiles rows lane / 4 and lane / 4 + 8.
    uint32_t query[2][2], query_depth[2][2];
    float peak[2][2], total[2][2], acc[2][HEAD_DIM / 8][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            query[m][half] = first_row + (32 * warp + 16 * m + 8 * half + lane / 4) / given.group;
            const bool valid = given.window && query[m][half] < given.rows;
            query_depth[m][half] = valid ? depth[query[m][half]] : 0;
            peak[m][half] = -INFINITY;
            total[m][half] = 0;
        }
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                acc[m][n][i] = 0;
            }
        }
    }

    const uint32_t full_begin = lists.full[tile], full_count = lists.full[tile + 1] - full_begin;
    const uint32_t partial_begin = lists.partial[tile];
    const uint32_t count = full_count + lists.partial[tile + 1] - partial_begin;
    auto block_of = [&](uint32_t i) {
        return i < full_count ? lists.full_blocks[full_begin + i] : lists.partial_blocks[partial_begin + i - full_count];
    };
    // Scores are kept as the products are: this brings them to the base of exp2f, in the same instruction as the difference
    // from the peak. Capped scores are brought there by the cap.
    const float unit = given.softcap > 0 ? 1 : given.scale * LOG2_E;

    uint32_t start = count ? block_of(0) * KEYS : 0;
    if (count) {
        load_keys<T, HEAD_DIM>(k_memory, k, given.k_row, start, given.rows);
    }
    commit();
    for (uint32_t i = 0; i < count; ++i) {
        wait<0>();
        __syncthreads();
        load_keys<T, HEAD_DIM>(v_memory, v, given.v_row, start, given.rows);
        commit();

        float scores[2][KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; ++step) {
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                load_matrices(a[m], Tile::address(q_memory, 32 * warp + 16 * m + lane % 16, 2 * step + lane / 16));
            }
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                uint32_t b[4];
                const int row = 16 * n + lane / 16 * 8 + lane % 8;
                load_matrices(b, Tile::address(k_memory, row, 2 * step + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    multiply<T>(scores[m][2 * n], a[m], b[0], b[1]);
                    multiply<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

        wait<0>();
        __syncthreads();
        const uint32_t own = start;
        if (i + 1 < count) {
            start = block_of(i + 1) * KEYS;
            load_keys<T, HEAD_DIM>(k_memory, k, given.k_row, start, given.rows);
        }
        commit();

        if (given.softcap > 0) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float share = scores[m][n][j] * given.scale / given.softcap;
                        scores[m][n][j] = given.softcap * LOG2_E * tanhf(share);
                    }
                }
            }
        }
        if (i >= full_count || given.window) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const uint32_t key = own + 8 * n + lane % 4 * 2 + j;
                    const uint32_t end = key < given.rows ? __ldg(subtree_end + key) : 0;
                    const uint32_t key_depth = given.window && key < given.rows ? __ldg(depth + key) : 0;
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
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

#pragma unroll
        for (int m = 0; m < 2; ++m) {
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
                const float factor = exp2f(peak[m][half] * unit - shift);
                peak[m][half] = highest;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float &score = scores[m][n][2 * half + j];
                        score = exp2f(score * unit - shift);
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

#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const float(&low)[4] = scores[m][2 * step], (&high)[4] = scores[m][2 * step + 1];
                a[m][0] = Half<T>::pack(low[0], low[1]);
                a[m][1] = Half<T>::pack(low[2], low[3]);
                a[m][2] = Half<T>::pack(high[0], high[1]);
                a[m][3] = Half<T>::pack(high[2], high[3]);
            }
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; ++n) {
                uint32_t b[4];
                load_transposed(b, Tile::address(v_memory, 16 * step + lane % 16, 2 * n + lane / 16));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    multiply<T>(acc[m][2 * n], a[m], b[0], b[1]);
                    multiply<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
    wait<0>();
    __syncthreads();

    // The output goes through the queries' memory, so that it is written 16 bytes at a time.
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int entry = 32 * warp + 16 * m + 8 * half + lane / 4;
            const float sum = sum_of_quad(total[m][half]);
            const float inverse = sum > 0 ? 1 / sum : 0;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                uint32_t *to = reinterpret_cast<uint32_t *>(memory + Tile::address(0, entry, n)) + lane % 4;
                *to = Half<T>::pack(acc[m][n][2 * half] * inverse, acc[m][n][2 * half + 1] * inverse);
            }
            const bool valid = entry < int(tile_rows * given.group) && query[m][half] < given.rows;
            if (lse && valid && lane % 4 == 0) {
                const uint32_t head = kv_head * given.group + entry % given.group;
                lse[uint64_t(head) * given.rows + query[m][half]] = (peak[m][half] * unit + log2f(sum)) / LOG2_E;
            }
        }
    }
    __syncwarp();
    for (int at = lane; at < 32 * Tile::CHUNKS; at += 32) {
        const uint32_t entry = 32 * warp + at / Tile::CHUNKS, chunk = at % Tile::CHUNKS;
        const uint32_t row = first_row + entry / given.group, head = kv_head * given.group + entry % given.group;
        if (entry < tile_rows * given.group && row < given.rows) {
            const uint4 value = *reinterpret_cast<const uint4 *>(memory + Tile::address(0, entry, chunk));
            *reinterpret_cast<uint4 *>(out + (uint64_t(row) * given.heads + head) * HEAD_DIM + 8 * chunk) = value;
        }
    }
}

} // namespace

#define TREE_ATTENTION(NAME, T, HEAD_DIM)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                         \
        NAME(const T *q, const T *k, const T *v, T *out, float *lse, const uint32_t *subtree_end,                    \
             const uint32_t *depth, const uint32_t *full, const uint32_t *full_blocks, const uint32_t *partial,      \
             const uint32_t *partial_blocks, const __grid_constant__ Sizes given) {                                  \
        const Lists lists = {full, full_blocks, partial, partial_blocks};                                            \
        tree_attention<T, HEAD_DIM>(q, k, v, out, lse, subtree_end, depth, lists, given);                            \
    }

TREE_ATTENTION(tree_attention_f16_64, __half, 64)
TREE_ATTENTION(tree_attention_f16_128, __half, 128)
TREE_ATTENTION(tree_attention_bf16_64, __nv_bfloat16, 64)
TREE_ATTENTION(tree_attention_bf16_128, __nv_bfloat16, 128)
