#pragma once

#include "emulator.h"

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

namespace emulator {

// To the nearest, ties to even; NaN stays NaN.
inline __nv_bfloat16 bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) {
        return {uint16_t(bits >> 16 | 0x40)};
    }
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float to_float(__nv_bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

} // namespace emulator

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {emulator::bfloat16(x), emulator::bfloat16(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 both) {
    return {emulator::to_float(both.x), emulator::to_float(both.y)};
}
