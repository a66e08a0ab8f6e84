// The kernels as functions that Rust calls, by their names: ../emulated.rs builds and loads this.

#include "emulator.h"

#include <index_select.cu>
#include <layer.cu>
#include <tree_attention.cu>
#include <tree_attention_hopper.cu>
#include <tree_gradient_hopper.cuh>

TREE_GRADIENT_HOPPER(tree_gradient_f16, __half)
TREE_GRADIENT_HOPPER(tree_gradient_bf16, __nv_bfloat16)

using emulator::launch;

namespace {

// Calls kernel(arguments...) with pointers cast to what it takes.
template <typename... Parameters, typename... Arguments>
void call(dim3 blocks, uint32_t threads, void (*kernel)(Parameters...), Arguments... arguments) {
    launch(blocks, threads, [=] { kernel((Parameters)arguments...); });
}

} // namespace

extern "C" {

// Has the kernel before the next one write what `memory` has now.
void emulate_previous(void *memory, uint64_t bytes) {
    const auto *from = static_cast<const uint8_t *>(memory);
    emulator::previous.push_back({memory, {from, from + bytes}});
}

// On a Hopper GPU of `processors` multiprocessors, or on another where there are none. Numbers are depths, and then what
// `Lists` has.
void emulate_tree_attention(uint32_t bf16, uint32_t head_dim, uint32_t processors, uint32_t tiles, uint32_t kv_heads,
                            const void *q, const void *k, const void *v, void *out, float *lse,
                            const void *const *numbers, const Sizes *given, uint32_t *next) {
    const int group = given->group;
    auto map = [&](const void *x, int64_t row, int64_t head, int64_t heads, int box_rows, int box_heads) {
        const auto *start = static_cast<const uint16_t *>(x);
        return CUtensorMap{start, given->rows, heads, head_dim, row, head, box_rows, box_heads};
    };
    const CUtensorMap q_map = map(q, given->q_row, given->q_head, given->heads, TILE / group, group);
    auto keys = [&](int rows) { return map(k, given->k_row, given->k_head, kv_heads, rows, 1); };
    auto values = [&](int rows) { return map(v, given->v_row, given->v_head, kv_heads, rows, 1); };
    const auto *blocks = static_cast<const KeyBlock *>(numbers[1]);
    auto list = [&](int at) { return static_cast<const uint32_t *>(numbers[at]); };
    const Lists lists{blocks, list(2), list(3), list(4), list(5), list(6)};
    auto run = [&](auto for_all, auto for_hopper) {
        const uint32_t items = tiles * kv_heads;
        processors ? call({min(processors, items), 1, 1}, HOPPER_THREADS, for_hopper, q_map, keys(KEYS), values(KEYS),
                          keys(1), values(1), out, lse, list(0), lists, *given, tiles, items, next)
                   : call({tiles, kv_heads, 1}, AMPERE_THREADS, for_all, q, k, v, out, lse, list(0), lists, *given);
    };
    if (head_dim == 64) {
        bf16 ? run(tree_attention_bf16_64, tree_attention_hopper_bf16_64)
             : run(tree_attention_f16_64, tree_attention_hopper_f16_64);
    } else {
        bf16 ? run(tree_attention_bf16_128, tree_attention_hopper_bf16_128)
             : run(tree_attention_f16_128, tree_attention_hopper_f16_128);
    }
}

// Of contiguous tensors, by all three kernels: x are q, k, v, out and dout, gradients are dq, dk and dv. Numbers are ends of
// subtrees, then the walks and the split blocks as the kernels take them.
void emulate_tree_gradient(uint32_t bf16, uint32_t walks, uint32_t splits, const void *const *x, const float *lse,
                           const uint32_t *const *numbers, float *pair_numbers, float *pair_sums, float *parts,
                           void *const *gradients, const GradientSizes *given) {
    const GradientSizes &sizes = *given;
    const int64_t rows = sizes.rows, kv_heads = sizes.kv_heads, heads = kv_heads * sizes.group, dim = GRADIENT_DIM;
    auto map = [&](int at, int64_t heads, int box_rows, int box_heads) {
        return CUtensorMap{static_cast<const uint16_t *>(x[at]), rows, heads, dim, heads * dim, dim, box_rows, box_heads};
    };
    auto pairs = [&](int at) { return map(at, heads, PAIRS / sizes.group, sizes.group); };
    auto keys = [&](int at) { return map(at, kv_heads, OWN_KEYS, 1); };
    auto run = [&](auto begin, auto walk, auto end) {
        const uint32_t steps = sizes.steps();
        call({steps * sizes.kv_heads, 1, 1}, 4 * PAIRS, begin, x[3], x[4], lse, pair_numbers, pair_sums, sizes);
        call({walks * sizes.kv_heads, 1, 1}, GRADIENT_THREADS, walk, pairs(0), pairs(4), keys(1), keys(2), pair_numbers,
             pair_sums, parts, gradients[1], gradients[2], numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
             sizes);
        call({(steps + splits) * sizes.kv_heads, 1, 1}, DIFFERENTIATORS, end, pair_sums, parts, numbers[5], numbers[6],
             gradients[0], gradients[1], gradients[2], sizes);
    };
    bf16 ? run(tree_gradient_bf16_begin, tree_gradient_bf16, tree_gradient_bf16_end)
         : run(tree_gradient_f16_begin, tree_gradient_f16, tree_gradient_f16_end);
}

void emulate_add_rms_norm(uint32_t bf16, uint32_t rows, uint32_t threads, const void *x, const void *delta,
                          const void *weight, void *sum, void *normed, uint32_t units, float epsilon) {
    auto run = [&](auto kernel) {
        call({rows, 1, 1}, threads, kernel, x, delta, weight, sum, normed, units, epsilon);
    };
    bf16 ? run(add_rms_norm_bf16) : run(add_rms_norm_f16);
}

void emulate_rotary_angles(uint32_t blocks, const uint32_t *positions, const Frequencies *frequencies, float *cos,
                           float *sin, uint64_t count, uint32_t pairs) {
    launch({blocks, 1, 1}, 256, [=] { rotary_angles(positions, *frequencies, cos, sin, count, pairs); });
}

void emulate_norm_rope(uint32_t bf16, uint32_t rows, uint32_t threads, const void *heads, const void *q_weight,
                       const void *k_weight, const void *cos, const void *sin, void *out, const uint32_t *sizes,
                       float epsilon) {
    auto run = [&](auto kernel) {
        call({rows, 1, 1}, threads, kernel, heads, q_weight, k_weight, cos, sin, out, sizes[0], sizes[1], sizes[2],
             sizes[3], sizes[4], epsilon);
    };
    bf16 ? run(norm_rope_bf16) : run(norm_rope_f16);
}

void emulate_swiglu(uint32_t bf16, uint32_t blocks, uint32_t threads, const void *gate_up, void *out, uint64_t count,
                    uint32_t units) {
    auto run = [&](auto kernel) { call({blocks, 1, 1}, threads, kernel, gate_up, out, count, units); };
    bf16 ? run(swiglu_bf16) : run(swiglu_f16);
}

// As many inputs as `inputs`; `widths` are in units of `unit` bytes.
void emulate_index_select(uint32_t unit, uint32_t wide, uint32_t inputs, uint32_t blocks, uint32_t threads,
                          const void *const *x, const void *ids, void *const *out, uint64_t count,
                          const uint32_t *widths, uint32_t lanes, uint32_t chunks, uint32_t row_blocks) {
    auto run = [&](auto narrow_ids, auto wide_ids) {
        auto with = [&](auto kernel) {
            call({blocks, inputs, 1}, threads, kernel, x[0], x[1], x[2], ids, out[0], out[1], out[2], count, widths[0],
                 widths[1], widths[2], lanes, chunks, row_blocks);
        };
        wide ? with(wide_ids) : with(narrow_ids);
    };
    switch (unit) {
    case 1: return run(index_select_1_u32, index_select_1_i64);
    case 2: return run(index_select_2_u32, index_select_2_i64);
    case 4: return run(index_select_4_u32, index_select_4_i64);
    case 8: return run(index_select_8_u32, index_select_8_i64);
    case 16: return run(index_select_16_u32, index_select_16_i64);
    }
}

} // extern "C"
