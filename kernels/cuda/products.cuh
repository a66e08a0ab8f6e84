// Products of a warpgroup's whole matrices in shared memory: rows in panels of 64 columns, 128 bytes a row.
#pragma once

#include <warpgroup.cuh>

namespace {

// c = a b^T, of 64 rows from `a` on of a matrix of A_ROWS and of all B_ROWS of `b`, both of HEAD_DIM columns.
template <typename T, int HEAD_DIM, int A_ROWS, int B_ROWS>
__device__ void multiply_panels(float (&c)[B_ROWS / 8][4], uint32_t a, uint32_t b) {
    const uint64_t first_a = descriptor(a, 0), first_b = descriptor(b, 0);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        const uint32_t panel = step / 4, column = 32 * (step % 4);
        const uint64_t own_a = further(first_a, panel * A_ROWS * 128 + column);
        const uint64_t own_b = further(first_b, panel * B_ROWS * 128 + column);
        if (step) {
            multiply_rows<T, false>(c, own_a, own_b);
        } else {
            multiply_rows<T, true>(c, own_a, own_b);
        }
    }
}

// c += weights b, of all 16 * STEPS rows of `b`.
template <typename T, int COLUMNS, int STEPS>
__device__ void add_panels(float (&c)[COLUMNS][4], const uint32_t (&weights)[STEPS][4], uint32_t b) {
    const uint64_t first = descriptor(b, 16 * STEPS * 128);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        multiply_columns<T>(c, weights[step], further(first, 16 * step * 128));
    }
}

} // namespace
