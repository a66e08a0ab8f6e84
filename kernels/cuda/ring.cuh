// How the roles of a block of threads hand parts of shared memory to each other on GPUs of compute capability 9.0.
#pragma once

#include <tensor_copy.cuh>

namespace {

// COUNT parts of shared memory that are filled and emptied in turns, the first again after the last. Each has a barrier
// that ends a phase when it is full, and one when it is empty. `at` counts all turns.
template <int COUNT> struct Ring {
    uint32_t memory, barriers, bytes;

    __device__ uint32_t stage(uint32_t at) const { return memory + at % COUNT * bytes; }
    __device__ uint32_t full(uint32_t at) const { return barriers + 8 * (at % COUNT); }
    __device__ uint32_t empty(uint32_t at) const { return barriers + 8 * (COUNT + at % COUNT); }
    static __device__ uint32_t parity(uint32_t at) { return at / COUNT % 2; }

    __device__ void make(uint32_t writers, uint32_t readers) const {
        for (int i = 0; i < COUNT; ++i) {
            make_barrier(full(i), writers);
            make_barrier(empty(i), readers);
        }
    }
    __device__ void await_full(uint32_t at) const { await(full(at), parity(at)); }
    // At once in the first round, where no phase has ended.
    __device__ void await_empty(uint32_t at) const { await(empty(at), parity(at) ^ 1); }
    // By each thread: an arrival orders its own thread's reads only (PTX, mbarrier.arrive).
    __device__ void emptied(uint32_t at) const { arrive(empty(at)); }
};

// By one thread: the boxes of all columns of `map`, to panels that are `panel` rows apart.
template <int HEAD_DIM>
__device__ void copy_columns(uint32_t to, uint32_t panel, const CUtensorMap &map, uint32_t head, uint32_t row,
                             uint32_t barrier) {
#pragma unroll
    for (int column = 0; column < HEAD_DIM; column += 64) {
        copy_box(to + column / 64 * panel * 128, map, column, head, row, barrier);
    }
}

} // namespace
