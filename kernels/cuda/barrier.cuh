// Barriers in shared memory, in the PTX of compute capability 9.0. tests/kernels/emulator/barrier.cuh is the same on a
// CPU.
#pragma once

#include <cstdint>

// A barrier of 8 bytes: each `arrivals` arrivals end a phase of it.
__device__ inline void make_barrier(uint32_t at, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

__device__ inline void arrive(uint32_t at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// Arrives when all copies of this thread so far are there.
__device__ inline void arrive_copied(uint32_t at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}

// Until all copies of this thread are there.
__device__ inline void wait_for_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Until the phase of this parity has ended, and the next not yet.
__device__ inline void await(uint32_t at, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred ended;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
                 "@ended bra done;\n"
                 "bra again;\n"
                 "done:\n"
                 "}" ::"r"(at),
                 "r"(parity)
                 : "memory");
}

// A barrier of COUNT threads, those that compute: whole warps.
template <int COUNT> __device__ void await_threads() { asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory"); }
