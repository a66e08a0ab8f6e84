// Attention over a batch that is folded onto its prefix trie, in depth-first order: FlashAttention-2 (arXiv 2307.08691,
// algorithm 1) over lists of key blocks. A row sees the rows above it in the trie and itself and, with a window, only the
// last `window` of these.
//
// A key block has KEYS rows that follow each other on a path, from a multiple of KEYS below its root on. What a row gets is
// summed over the blocks of its path, from the last to the first, wherever in the batch it lies: in the order, and with the
// roundings, of the FlashAttention-2 of PyTorch for heads of 128 over that path alone, so that bits are the same.
//
// A block of threads computes a tile of TILE queries: all query heads of one key head for TILE / group rows, so that a key
// or value is read once for the whole group. This is what the kernels for all GPUs and for Hopper have in common: how a
// tile's rows come and go, and a warp's part of the softmax.
#pragma once

#include <cstdint>
#include <half.cuh>
#include <warp.cuh>

namespace {

constexpr int TILE = 192;
constexpr int KEYS = 64;
// As PyTorch multiplies the scale, before it rounds to float.
constexpr double EXACT_LOG2_E = 1.4426950408889634;
constexpr float LOG2_E = float(EXACT_LOG2_E);

// What src/tree_attention.rs calls by the same name. Strides are elements from row to row and from head to head; the
// output is contiguous. `window` and `softcap` are 0 where there is none.
struct Sizes {
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    uint32_t rows, heads, group, window;
    float scale, softcap;
};

// KEYS rows of a path: `shared` of them, listed from `above` on, and then rows `first` and the next. It is the path of rows
// `first` to `end`, which see its keys up to themselves. `depth` rows are above the row `first`.
struct alignas(16) KeyBlock {
    uint32_t first, end, depth, above;

    __device__ uint32_t shared() const { return depth % KEYS; }

    // Of the key at `place`.
    __device__ uint32_t row(uint32_t place, const uint32_t *rows_above) const {
        return place < shared() ? rows_above[above + place] : first + place - shared();
    }
    // How many of the keys `row` sees.
    __device__ int seen(uint32_t row) const {
        return row < first || row >= end ? 0 : min(row - first + shared() + 1, uint32_t(KEYS));
    }
    // Whether some of the rows from `low` to `high` see any.
    __device__ bool seen_among(uint32_t low, uint32_t high) const { return low < end && high >= first; }
    // How many come before the window of a row at `row_depth`.
    __device__ int passed(uint32_t row_depth, uint32_t window) const {
        const uint32_t nearest = row_depth < window ? 0 : row_depth - window + 1;
        return max(int(nearest) - int(depth - shared()), 0);
    }
};

// Key blocks, the rows above that they list, and which of them each tile sees, from those of the deepest rows on: those that
// some of its queries see in part, then those that all see whole, lists between [tiles + 1] offsets.
struct Lists {
    const KeyBlock *blocks;
    const uint32_t *above, *partial, *partial_blocks, *full, *full_blocks;
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

// The entries `first`, `first + STRIDE` and so on, without a division for each.
template <int STRIDE> struct Entries {
    const Tile &tile;
    uint32_t entry, row, head, more_rows, more_heads;

    __device__ Entries(const Tile &tile, uint32_t first)
        : tile(tile), entry(first), row(tile.row(first)), head(tile.head(first)), more_rows(STRIDE / tile.group),
          more_heads(STRIDE % tile.group) {}

    __device__ bool valid() const { return entry < tile.entries; }
    __device__ void advance() {
        entry += STRIDE, row += more_rows, head += more_heads;
        if (head >= tile.first_head + tile.group) {
            head -= tile.group, ++row;
        }
    }
};

// Where a row's chunk of 16 bytes is in shared memory, of a matrix of ROWS rows that starts at `base`, a multiple of 1024.
// Columns are in panels of 64, 128 bytes a row; chunks are permuted by the row's number, so that eight rows' chunks of one
// column lie in different banks. The tensor cores' descriptors call this a swizzle of 128 bytes.
template <int ROWS> __device__ uint32_t address(uint32_t base, uint32_t row, uint32_t chunk) {
    return base + 128 * (chunk / 8 * ROWS + row) + 16 * (chunk % 8 ^ row % 8);
}

__device__ float maximum_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 2);
    return x + __shfl_xor_sync(0xffffffff, x, 1);
}

// A thread's part of 16 * PARTS queries of its warp and of WIDTH keys at a time: in each of the PARTS tiles of the
// tensor cores, rows lane / 4 and lane / 4 + 8, and of these columns lane % 4 * 2 and the next of every eight.
template <typename T, int HEAD_DIM, int PARTS, int WIDTH> struct Queries {
    using Scores = float[PARTS][WIDTH / 8][4];

    uint32_t query[PARTS][2], query_depth[PARTS][2];
    float peak[PARTS][2], total[PARTS][2], acc[PARTS][HEAD_DIM / 8][4];
    // Brings scores to the base of exp2. They are kept as the products are; capped ones are brought there by the cap.
    float unit;

    static __device__ uint32_t entry(int part, int half) {
        return 16 * (PARTS * (threadIdx.x / 32) + part) + 8 * half + threadIdx.x % 32 / 4;
    }

    __device__ Queries(const Tile &tile, const uint32_t *depth, const Sizes &given) : acc{} {
        unit = given.softcap > 0 ? 1 : float(given.scale * EXACT_LOG2_E);
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
            for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // tanh x = 1 - 2 / (e^2x + 1), to some 22 bits of 1.
                    const float power = power_of_two(scores[m][n][i] * (2 * LOG2_E * given.scale / given.softcap));
                    scores[m][n][i] = given.softcap * LOG2_E * (1 - __fdividef(2, power + 1));
                }
            }
        }
    }

    // All but the keys that each query sees, from `passed` to `seen`.
    __device__ void hide(Scores &scores, const int (&passed)[PARTS][2], const int (&seen)[PARTS][2]) const {
#pragma unroll
        for (int m = 0; m < PARTS; ++m) {
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = 8 * n + threadIdx.x % 4 * 2 + i % 2;
                    if (key < passed[m][i / 2] || key >= seen[m][i / 2]) {
                        scores[m][n][i] = -INFINITY;
                    }
                }
            }
        }
    }

    // From scores to weights; what there is so far has to be brought to the new peak by `factor`. Where products and sums
    // are rounded apart and where not, and which comes first, is as in the machine code of PyTorch 2.11's
    // flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>> for compute capability 9.0.
    __device__ void weigh(Scores &scores, float (&factor)[PARTS][2]) {
#pragma unroll
        for (int m = 0; m < PARTS; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float highest = peak[m][half], other = -INFINITY;
#pragma unroll
                for (int n = 0; n < WIDTH / 8; ++n) {
                    highest = fmaxf(highest, scores[m][n][2 * half]);
                    other = fmaxf(other, scores[m][n][2 * half + 1]);
                }
                highest = maximum_of_quad(fmaxf(highest, other));
                // A query that has seen nothing yet has no difference to take.
                const float base = highest == -INFINITY ? 0 : highest, shift = __fmul_rn(base, unit);
                factor[m][half] = power_of_two(__fmul_rn(peak[m][half] - base, unit));
                peak[m][half] = highest;
                float sum = total[m][half];
#pragma unroll
                for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float &score = scores[m][n][2 * half + j];
                        score = power_of_two(__fmul_rn(score, unit) - shift);
                        sum = n + j ? sum + score : fmaf(sum, factor[m][half], score);
                    }
                }
                total[m][half] = sum;
            }
        }
    }

    // A factor of 1 changes nothing, and most are: peaks are found early.
    __device__ void rescale(const float (&factor)[PARTS][2]) {
#pragma unroll
        for (int m = 0; m < PARTS; ++m) {
            if (!__any_sync(0xffffffff, factor[m][0] != 1 || factor[m][1] != 1)) {
                continue;
            }
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    acc[m][n][i] *= factor[m][i / 2];
                }
            }
        }
    }

    // The weights of keys 16 * step and the next 15 as the tensor cores take a left factor.
    static __device__ void pack(const float (&weights)[WIDTH / 8][4], int step, uint32_t (&to)[4]) {
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
                    // As PyTorch, too.
                    const float natural = given.softcap > 0 ? 1 / LOG2_E : given.scale;
                    const float logarithm = fmaf(peak[m][half], natural, __logf(sum));
                    lse[uint64_t(tile.head(at)) * given.rows + tile.row(at)] = logarithm;
                }
            }
        }
        __syncwarp();
        const uint32_t chunk = lane % CHUNKS;
        Entries<32 / CHUNKS> own(tile, 16 * PARTS * (threadIdx.x / 32) + lane / CHUNKS);
#pragma unroll
        for (int i = 0; i < 16 * PARTS * CHUNKS / 32; ++i) {
            if (own.valid()) {
                const uint4 value = *reinterpret_cast<const uint4 *>(memory + address<TILE>(0, own.entry, chunk));
                T *to = out + (uint64_t(own.row) * given.heads + own.head) * HEAD_DIM + 8 * chunk;
                *reinterpret_cast<uint4 *>(to) = value;
            }
            own.advance();
        }
    }
};

} // namespace
