// What a warpgroup, four warps, does together, in the PTX of compute capability 9.0a. tests/kernels/emulator/warpgroup.cuh
// is the same on a CPU.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// What is the same for all threads of a warp, so that the compiler sees it to be.
__device__ inline uint32_t same_for_warp(uint32_t x) { return __shfl_sync(0xffffffff, x, 0); }

// The number of this thread's warpgroup.
__device__ inline uint32_t warpgroup() { return same_for_warp(threadIdx.x / 128); }

// What this thread has written to shared memory is there for the tensor cores and the copy engine after the next barrier.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product after registers of products were used.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until only the last PENDING groups of products may be under way; registers of the others need `settle`.
template <int PENDING> __device__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Gives the warpgroup's threads COUNT registers each, fewer or more than the kernel began with.
template <int COUNT> __device__ void shrink() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> __device__ void grow() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Adds to four numbers in memory that others add to as well, in any order.
__device__ inline void add_to(float *to, const float (&more)[4]) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(more[0]), "f"(more[1]), "f"(more[2]),
                 "f"(more[3])
                 : "memory");
}

// Keeps the compiler from moving uses of registers of products over the wait or the beginning.
template <int N> __device__ void settle(float (&c)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
    }
}

template <int N> __device__ void settle(float (&c)[N][2]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1])::"memory");
    }
}

template <int N> __device__ void settle(uint32_t (&a)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
    }
}

// A matrix of 2-byte elements in shared memory, rows of 128 bytes swizzled by 128 bytes, from a multiple of 1024 bytes on
// plus 32 bytes for each 16 columns. Its panels of 64 columns are `panel` bytes apart where more than one is read.
__device__ inline uint64_t descriptor(uint32_t address, uint32_t panel) {
    constexpr uint64_t SWIZZLE_128 = 1, EIGHT_ROWS = 8 * 128;
    return SWIZZLE_128 << 62 | EIGHT_ROWS >> 4 << 32 | uint64_t(panel >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// The matrix that is `bytes` further on, without a carry.
__device__ inline uint64_t further(uint64_t descriptor, uint32_t bytes) {
    return descriptor >> 32 << 32 | (uint32_t(descriptor) + (bytes >> 4));
}

#define FOUR(WHAT, c, i) WHAT(c[i][0]), WHAT(c[i][1]), WHAT(c[i][2]), WHAT(c[i][3])
#define SIXTEEN(WHAT, c, i) FOUR(WHAT, c, i), FOUR(WHAT, c, i + 1), FOUR(WHAT, c, i + 2), FOUR(WHAT, c, i + 3)
#define REGISTERS_32                                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                                                 \
    REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
                 "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c = a b^T for FIRST, else c += a b^T: rows of the 64 x 16 `a` and the 8 * N x 16 `b` in shared memory. A thread has the
// elements of c that it has of N m16n8k16.
template <typename T, bool FIRST> __device__ void multiply_rows(float (&c)[8][4], uint64_t a, uint64_t b);
template <typename T, bool FIRST> __device__ void multiply_rows(float (&c)[16][4], uint64_t a, uint64_t b);

// c = a^T b for FIRST, else c += a^T b: columns of the 16 x 64 `a` and the 16 x 64 `b` in shared memory.
template <typename T, bool FIRST> __device__ void multiply_across(float (&c)[8][4], uint64_t a, uint64_t b);

// c += a b: the 64 x 16 `a` as in m16n8k16, the 16 x 8 * N `b` in shared memory.
template <typename T> __device__ void multiply_columns(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b);
template <typename T> __device__ void multiply_columns(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b);

#define PRODUCT(COLUMNS, NAME, REGISTERS, FACTORS)                                                                    \
    "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." NAME "." NAME " {" REGISTERS "}, " FACTORS ";"
#define ALL_64(WHAT, c) SIXTEEN(WHAT, c, 0), SIXTEEN(WHAT, c, 4)
#define ALL_128(WHAT, c) ALL_64(WHAT, c), SIXTEEN(WHAT, c, 8), SIXTEEN(WHAT, c, 12)

#define MULTIPLY_SHARED(T, NAME, FIRST, ADD, WHAT)                                                                   \
    template <> __device__ inline void multiply_rows<T, FIRST>(float(&c)[8][4], uint64_t a, uint64_t b) {            \
        asm volatile(PRODUCT("64", NAME, REGISTERS_32, "%32, %33, " ADD ", 1, 1, 0, 0")                              \
                     : ALL_64(WHAT, c)                                                                               \
                     : "l"(a), "l"(b));                                                                              \
    }                                                                                                                \
    template <> __device__ inline void multiply_across<T, FIRST>(float(&c)[8][4], uint64_t a, uint64_t b) {          \
        asm volatile(PRODUCT("64", NAME, REGISTERS_32, "%32, %33, " ADD ", 1, 1, 1, 1")                              \
                     : ALL_64(WHAT, c)                                                                               \
                     : "l"(a), "l"(b));                                                                              \
    }                                                                                                                \
    template <> __device__ inline void multiply_rows<T, FIRST>(float(&c)[16][4], uint64_t a, uint64_t b) {           \
        asm volatile(PRODUCT("128", NAME, REGISTERS_64, "%64, %65, " ADD ", 1, 1, 0, 0")                             \
                     : ALL_128(WHAT, c)                                                                              \
                     : "l"(a), "l"(b));                                                                              \
    }

#define PRODUCTS(T, NAME)                                                                                            \
    MULTIPLY_SHARED(T, NAME, true, "0", "=f")                                                                          \
    MULTIPLY_SHARED(T, NAME, false, "1", "+f")                                                                         \
    template <> __device__ inline void multiply_columns<T>(float(&c)[8][4], const uint32_t(&a)[4], uint64_t b) {     \
        asm volatile(PRODUCT("64", NAME, REGISTERS_32, "{%32, %33, %34, %35}, %36, 1, 1, 1, 1")                      \
                     : ALL_64("+f", c)                                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
    }                                                                                                                \
    template <> __device__ inline void multiply_columns<T>(float(&c)[16][4], const uint32_t(&a)[4], uint64_t b) {    \
        asm volatile(PRODUCT("128", NAME, REGISTERS_64, "{%64, %65, %66, %67}, %68, 1, 1, 1, 1")                     \
                     : ALL_128("+f", c)                                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
    }

PRODUCTS(__half, "f16")
PRODUCTS(__nv_bfloat16, "bf16")
