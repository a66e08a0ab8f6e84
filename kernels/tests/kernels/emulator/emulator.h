// Runs CUDA kernels on a CPU, a block after the other, to test them where there is no GPU.
//
// A thread of a block is a fiber, and one fiber runs at a time until it waits for others: at a barrier, or for what the
// lanes of its warp do together. Which one goes on is drawn at random, and one warp at a time starves: it goes on where
// no other can. So a missing barrier shows. Copies to shared memory happen when they are waited for and no sooner, or
// at random where they arrive at a barrier by themselves, and shared memory starts as NaN, so that a missing wait
// shows.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct dim3 {
    uint32_t x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;
// What an sm_90 block may have.
constexpr size_t SHARED = 227 << 10;

struct Copy {
    uint32_t to;
    const void *from;
    bool valid;
    uint32_t bytes;
};

struct Barrier {
    std::vector<int> waiting;
};

// What the lanes of a warp show each other, in two halves: nobody overwrites what another has yet to read.
struct Warp {
    Barrier barrier;
    uint32_t shown[2][WARP][8];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    int half = 0;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
    // The tensor cores see for this thread what the copy engine brought until then.
    uint64_t awaited = 0;
    bool products_begun = false, has_awaited = false;
    std::vector<std::function<void()>> open_products;
    std::vector<std::vector<std::function<void()>>> products;
};

// What the kernel before writes to some memory.
struct Written {
    void *memory;
    std::vector<uint8_t> bytes;
};
inline std::vector<Written> previous;

// Copies under way, of a thread or of the copy engine, and the barrier that they arrive at: the engine by its bytes.
struct Flight {
    int writer;
    uint32_t barrier;
    std::vector<Copy> copies;
};

// A barrier in shared memory, which may wait for bytes of the copy engine as well.
struct Phased {
    uint32_t arrivals, arrived, phase;
    std::vector<int> waiting;
    int64_t bytes = 0;

    void arrive();
    void end();
};

alignas(128) inline uint8_t memory[SHARED];
// What is known of a chunk of 16 bytes: when it was copied, never at first, by which thread or by the copy engine, and
// whether that thread has published it since.
constexpr int ENGINE = -1;
struct Chunk {
    uint64_t landed = UINT64_MAX;
    int writer = ENGINE;
    bool published = false;
};
inline Chunk chunks[SHARED / 16];
inline uint64_t now;

inline void copy(const Copy &given, int writer) {
    ++now;
    std::memset(memory + given.to, 0, given.bytes);
    if (given.valid) {
        std::memcpy(memory + given.to, given.from, given.bytes);
    }
    chunks[given.to / 16] = {now, writer, false};
}

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    // Of all threads, and of some.
    Barrier barrier, some;
    std::map<uint32_t, Phased> phased;
    std::vector<Flight> flights;
    std::vector<int> ready, paused;
    std::function<void()> kernel;
    std::mt19937 draw;
    ucontext_t launcher;
    int current = 0, done = 0, starved = 0;
    bool has_previous = false;

    Phased &phased_at(uint32_t at) {
        const auto found = phased.find(at);
        if (found == phased.end()) {
            std::fprintf(stderr, "emulator: no barrier at %u\n", at);
            std::abort();
        }
        return found->second;
    }

    void land(size_t index) {
        const Flight flight = std::move(flights[index]);
        flights[index] = std::move(flights.back());
        flights.pop_back();
        Phased &barrier = phased_at(flight.barrier);
        for (const Copy &one : flight.copies) {
            copy(one, flight.writer);
            barrier.bytes -= flight.writer == ENGINE ? one.bytes : 0;
        }
        flight.writer == ENGINE ? barrier.end() : barrier.arrive();
    }

    // To any fiber that may run, or back to the launcher after the last.
    void next() {
        while (!flights.empty() && (ready.empty() || draw() % 512 == 0)) {
            land(draw() % flights.size());
        }
        if (ready.empty()) {
            ready.swap(paused);
        }
        if (ready.empty()) {
            if (done != int(fibers.size())) {
                std::fputs("emulator: all threads wait for others\n", stderr);
                std::abort();
            }
            setcontext(&launcher);
        }
        if (draw() % 4096 == 0) {
            starved = draw() % warps.size();
        }
        size_t index = draw() % ready.size();
        for (size_t tried = 1; tried < ready.size() && ready[index] / WARP == starved; ++tried) {
            index = (index + 1) % ready.size();
        }
        const int from = current, to = ready[index];
        ready[index] = ready.back();
        ready.pop_back();
        if (to != from) {
            current = to;
            swapcontext(&fibers[from].context, &fibers[to].context);
        }
    }

    // Lets all others run first as far as they can, now and then.
    void pause() {
        if (draw() % 64 == 0) {
            paused.push_back(current);
            next();
        }
    }

    void arrive(Barrier &at, size_t parties) {
        at.waiting.push_back(current);
        if (at.waiting.size() == parties) {
            ready.insert(ready.end(), at.waiting.begin(), at.waiting.end());
            at.waiting.clear();
        }
        next();
    }
};

inline Block *block = nullptr;

inline void Phased::arrive() {
    ++arrived;
    end();
}

inline void Phased::end() {
    if (arrived == arrivals && bytes == 0) {
        arrived = 0, ++phase;
        block->ready.insert(block->ready.end(), waiting.begin(), waiting.end());
        waiting.clear();
    }
}

// A thread's numbers; they follow the fiber that runs.
struct ThreadIndex {
    struct X {
        operator uint32_t() const { return block->current; }
    } x;
};

inline void enter() {
    block->kernel();
    const auto own = [](const Flight &flight) { return flight.writer == block->current; };
    if (std::any_of(block->flights.begin(), block->flights.end(), own)) {
        std::fputs("emulator: a thread ended before its copies\n", stderr);
        std::abort();
    }
    if (!previous.empty() && !block->fibers[block->current].has_awaited) {
        std::fputs("emulator: a thread did not await the kernel before\n", stderr);
        std::abort();
    }
    ++block->done;
    block->next();
}

} // namespace emulator

inline emulator::ThreadIndex threadIdx;
inline dim3 blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulator::block->arrive(emulator::block->barrier, emulator::block->fibers.size()); }

namespace emulator {

inline Fiber &fiber() { return block->fibers[block->current]; }
inline int lane() { return block->current % WARP; }

// Shows `words` to the warp, and returns what its lanes have shown.
template <int N> const uint32_t (*show(const uint32_t (&words)[N]))[8] {
    static_assert(N <= 8);
    Warp &warp = block->warps[block->current / WARP];
    Fiber &own = fiber();
    const int half = own.half;
    own.half ^= 1;
    std::memcpy(warp.shown[half][lane()], words, sizeof words);
    block->arrive(warp.barrier, WARP);
    return warp.shown[half];
}

// Calls `kernel` as a grid of `blocks` blocks of `threads` threads.
inline void launch(dim3 blocks, uint32_t threads, const std::function<void()> &kernel) {
    gridDim = blocks;
    blockDim = {threads, 1, 1};
    for (uint32_t y = 0; y < blocks.y; ++y) {
        for (uint32_t x = 0; x < blocks.x; ++x) {
            Block own;
            own.fibers = std::vector<Fiber>(threads);
            own.warps = std::vector<Warp>(threads / WARP);
            own.kernel = kernel;
            own.draw.seed(x + 1000 * y);
            own.current = own.draw() % threads;
            own.starved = own.draw() % own.warps.size();
            block = &own;
            blockIdx = {x, y, 0};
            std::memset(memory, 0xff, SHARED);
            for (const Written &one : previous) {
                std::memset(one.memory, 0xff, one.bytes.size());
            }
            std::fill(std::begin(chunks), std::end(chunks), Chunk{});
            now = 0;
            for (uint32_t i = 0; i < threads; ++i) {
                Fiber &fiber = own.fibers[i];
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.get();
                fiber.context.uc_stack.ss_size = STACK;
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, enter, 0);
                if (int(i) != own.current) {
                    own.ready.push_back(i);
                }
            }
            swapcontext(&own.launcher, &own.fibers[own.current].context);
        }
    }
    previous.clear();
}

} // namespace emulator

inline void __syncwarp() { emulator::show({0u}); }

inline float __shfl_xor_sync(uint32_t, float value, int distance) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const auto shown = emulator::show({bits});
    std::memcpy(&value, shown[emulator::lane() ^ distance], 4);
    return value;
}

inline bool __any_sync(uint32_t, bool predicate) {
    const auto shown = emulator::show({uint32_t(predicate)});
    return std::any_of(shown, shown + emulator::WARP, [](const uint32_t (&words)[8]) { return words[0]; });
}

template <typename T> T __ldg(const T *at) { return *at; }
inline uint32_t atomicAdd(uint32_t *at, uint32_t more) { return std::exchange(*at, *at + more); }
template <typename T> void __stcs(T *at, T value) { *at = value; }

using std::max;
using std::min;

inline float __fmul_rn(float x, float y) { return x * y; }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
