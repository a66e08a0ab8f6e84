#pragma once

#include "emulator.h"

struct __half {
    _Float16 value;
};
struct __half2 {
    __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {{_Float16(x)}, {_Float16(y)}}; }
inline float2 __half22float2(__half2 both) { return {float(both.x.value), float(both.y.value)}; }
