// cuda/launch.cuh on the emulator: what the kernel before writes is there when a block awaits it, and no sooner.
#pragma once

#include "emulator.h"

inline void await_previous() {
    emulator::fiber().has_awaited = true;
    if (!emulator::block->has_previous) {
        emulator::block->has_previous = true;
        for (const emulator::Written &one : emulator::previous) {
            std::memcpy(one.memory, one.bytes.data(), one.bytes.size());
        }
    }
}
