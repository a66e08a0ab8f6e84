// cuda/barrier.cuh on the emulator.
#pragma once

#include <warp.cuh>

inline void make_barrier(uint32_t at, uint32_t arrivals) { emulator::block->phased[at] = {arrivals, 0, 0}; }

// Others may see it before this thread goes on.
inline void arrive(uint32_t at) {
    emulator::block->phased_at(at).arrive();
    emulator::block->pause();
}

inline void arrive_copied(uint32_t at) {
    emulator::Block &block = *emulator::block;
    block.flights.push_back({block.current, at, std::move(emulator::fiber().open)});
    emulator::fiber().open.clear();
}

inline void wait_for_all() {
    auto &flights = emulator::block->flights;
    for (size_t i = flights.size(); i-- > 0;) {
        if (flights[i].writer == emulator::block->current) {
            emulator::block->land(i);
        }
    }
}

inline void await(uint32_t at, uint32_t parity) {
    emulator::Phased &barrier = emulator::block->phased_at(at);
    while (barrier.phase % 2 == parity) {
        barrier.waiting.push_back(emulator::block->current);
        emulator::block->next();
    }
    emulator::fiber().awaited = emulator::now;
}

template <int COUNT> void await_threads() { emulator::block->arrive(emulator::block->some, COUNT); }
