// Copies of boxes of tensors to shared memory by the copy engine of compute capability 9.0, in PTX.
// tests/kernels/emulator/tensor_copy.cuh is the same on a CPU.
#pragma once

#include <barrier.cuh>
#include <cuda.h>

// Arrives, and has the phase wait for `bytes` of copies besides.
__device__ inline void arrive_expecting(uint32_t at, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

// The box of `map`'s tensor [rows, heads, columns] that starts there, zeros where there is no tensor. It arrives at
// `barrier` by its bytes, and is there for the tensor cores when that has been awaited.
__device__ inline void copy_box(uint32_t to, const CUtensorMap &map, int column, int head, int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
                 "[%5];" ::"r"(to),
                 "l"(&map), "r"(column), "r"(head), "r"(row), "r"(barrier)
                 : "memory");
}
