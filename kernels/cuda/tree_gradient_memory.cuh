// What the kernels of tree_gradient_hopper.cuh share: their sizes, the walks, and a block's shared memory.
#pragma once

#include <ring.cuh>
#include <tree_attention.cuh>

namespace {

constexpr int GRADIENT_DIM = 128;
// Of a step of a walk the (row, head) pairs, and the keys of a block, of which each of two warpgroups has half.
constexpr int PAIRS = 64, OWN_KEYS = 128;
// A third warpgroup, which must be whole to give up registers, has a warp that loads.
constexpr int DIFFERENTIATORS = 256, FETCHERS = 32, GRADIENT_THREADS = DIFFERENTIATORS + 128;
constexpr int GRADIENT_STAGES = 2;
// Floats of a step that every pair has: its logsumexp to the base of exp2, and the product of its output and gradient.
constexpr int PAIR_NUMBERS = 2 * PAIRS;

// What Python calls by the same name. Strides are elements from row to row and from head to head.
struct GradientSizes {
    int64_t out_row, out_head, dout_row, dout_head;
    uint32_t rows, kv_heads, group;
    float scale;

    __device__ uint32_t step_rows() const { return PAIRS / group; }
    __device__ uint32_t steps() const { return (rows + step_rows() - 1) / step_rows(); }
};

// Step `step` of all walks is that of rows step * step_rows and on: [steps, kv_heads] of what a step has.
struct Step {
    uint32_t first_row, first_head, at;

    __device__ Step(const GradientSizes &sizes, uint32_t step, uint32_t kv_head)
        : first_row(step * sizes.step_rows()), first_head(kv_head * sizes.group), at(step * sizes.kv_heads + kv_head) {}
};

// Sums of float32 are kept as the tensor cores' registers are: of [PAIRS, GRADIENT_DIM] each warpgroup has half of the
// columns; of [OWN_KEYS, GRADIENT_DIM] half of the rows. Chunks of four are [8 columns][thread].
constexpr uint32_t PAIR_SUMS = PAIRS * GRADIENT_DIM, KEY_SUMS = OWN_KEYS * GRADIENT_DIM;

// `radix_mlp.torch.walks.Walks` that are aligned: walk i is that of block key_block[i], from its step first_step[i], where
// its first is the step of all rows that has its first key, to before row end[i].
struct Walks {
    const uint32_t *key_block, *first_step, *end, *part;
};

// One walk of a key head: the keys' block sees steps from that of row `start` to before that of row `end`.
struct Walk {
    uint32_t first_key, start, end, part, kv_head;

    __device__ Walk(const Walks &walks, const GradientSizes &sizes) {
        const uint32_t own = blockIdx.x / sizes.kv_heads;
        kv_head = blockIdx.x % sizes.kv_heads;
        first_key = OWN_KEYS * walks.key_block[own];
        start = (first_key / sizes.step_rows() + walks.first_step[own]) * sizes.step_rows();
        end = walks.end[own], part = walks.part[own];
    }
};

struct GradientMemory {
    static constexpr uint32_t KEY_BYTES = OWN_KEYS * GRADIENT_DIM * 2, PAIR_BYTES = PAIRS * GRADIENT_DIM * 2;
    // Of both parities of steps, [OWN_KEYS, PAIRS].
    static constexpr uint32_t SCORE_BYTES = OWN_KEYS * PAIRS * 2;
    static constexpr uint32_t K = 0, V = K + KEY_BYTES, Q = V + KEY_BYTES, DOUT = Q + GRADIENT_STAGES * PAIR_BYTES;
    static constexpr uint32_t SCORES = DOUT + GRADIENT_STAGES * PAIR_BYTES, NUMBERS = SCORES + 2 * SCORE_BYTES;
    // Which of a step's rows each pair is of.
    static constexpr uint32_t ROW_OF = NUMBERS + GRADIENT_STAGES * PAIR_NUMBERS * 4;
    static constexpr uint32_t KEY_BARRIERS = ROW_OF + PAIRS * 4, Q_BARRIERS = KEY_BARRIERS + 16;
    static constexpr uint32_t DOUT_BARRIERS = Q_BARRIERS + 16 * GRADIENT_STAGES;
    static constexpr uint32_t BYTES = DOUT_BARRIERS + 16 * GRADIENT_STAGES;

    uint32_t base = shared_address(shared_memory());
    Ring<1> keys{base, base + KEY_BARRIERS, 0};
    Ring<GRADIENT_STAGES> q{base + Q, base + Q_BARRIERS, PAIR_BYTES};
    Ring<GRADIENT_STAGES> dout{base + DOUT, base + DOUT_BARRIERS, PAIR_BYTES};

    __device__ void make() const {
        keys.make(1, 1);
        // Each lane has numbers of the pairs to copy, one of them has all queries.
        q.make(FETCHERS + 1, DIFFERENTIATORS);
        dout.make(1, DIFFERENTIATORS);
    }
    static __device__ uint32_t numbers(uint32_t at) { return NUMBERS + at % GRADIENT_STAGES * PAIR_NUMBERS * 4; }
    __device__ uint32_t scores(uint32_t at) const { return base + SCORES + at % 2 * SCORE_BYTES; }
};

} // namespace
