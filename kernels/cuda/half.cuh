// Pairs of the two dtypes of 2 bytes, as 32 bits, to and from float.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T> struct Half;

template <> struct Half<__half> {
    static __device__ uint32_t pack(float low, float high) {
        const __half2 both = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t *>(&both);
    }
    static __device__ float2 unpack(uint32_t both) { return __half22float2(*reinterpret_cast<const __half2 *>(&both)); }
};

template <> struct Half<__nv_bfloat16> {
    static __device__ uint32_t pack(float low, float high) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t *>(&both);
    }
    static __device__ float2 unpack(uint32_t both) {
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&both));
    }
};

// One 16-byte load.
struct alignas(16) Floats {
    float at[4];
};

// Four elements, one 8-byte load.
template <typename T> struct Four {
    uint2 bits;

    __device__ Floats floats() const {
        const float2 low = Half<T>::unpack(bits.x), high = Half<T>::unpack(bits.y);
        return {{low.x, low.y, high.x, high.y}};
    }
    static __device__ Four of(const Floats &from) {
        return {{Half<T>::pack(from.at[0], from.at[1]), Half<T>::pack(from.at[2], from.at[3])}};
    }
};

// Eight elements, one 16-byte load.
template <typename T> struct Eight {
    uint4 bits;

    __device__ void to_floats(float (&to)[8]) const {
        const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 both = Half<T>::unpack(pairs[i]);
            to[2 * i] = both.x;
            to[2 * i + 1] = both.y;
        }
    }
    static __device__ Eight of_floats(const float (&from)[8]) {
        return {{Half<T>::pack(from[0], from[1]), Half<T>::pack(from[2], from[3]), Half<T>::pack(from[4], from[5]),
                 Half<T>::pack(from[6], from[7])}};
    }
};
