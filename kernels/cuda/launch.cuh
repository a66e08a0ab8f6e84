// How kernels of one stream follow each other: src/cuda/launch.rs lets their blocks begin while the kernel before ends.
#pragma once

#include <cstdint>

// Until the kernel before is done, and what it wrote can be seen. All threads call it before they touch memory, other than
// the block's own.
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The block's number, counted from the last: rows that the kernel before wrote last are read first, while the cache has
// them.
__device__ inline uint32_t block_from_the_end() { return gridDim.x - 1 - blockIdx.x; }
