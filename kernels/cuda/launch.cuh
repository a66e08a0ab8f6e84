// How kernels of one stream follow each other: src/cuda/launch.rs lets their blocks begin while the kernel before ends.
// tests/kernels/emulator/launch.cuh is the same on a CPU.
#pragma once

// Until the kernel before is done, and what it wrote can be seen. All threads call it before they touch memory, other than
// the block's own.
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
