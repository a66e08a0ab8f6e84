// Runs CUDA kernels on a CPU, a block after the other, to test them where there is no GPU.
//
// A thread of a block is a fiber, and one fiber runs at a time until it waits for others: at a barrier, or for what the
// lanes of its warp do together. Which one goes on is drawn at random, so that a missing barrier shows. Copies to shared
// memory happen when they are waited for and no sooner, and shared memory starts as NaN, so that a missing wait shows.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <ucontext.h>
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
    // Chunks of 16 bytes that the tensor cores may not see yet.
    std::vector<uint32_t> unpublished;
    std::vector<std::function<void()>> products, open_products;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    std::vector<int> ready;
    std::function<void()> kernel;
    std::mt19937 draw;
    ucontext_t launcher;
    int current = 0, done = 0;

    // To any fiber that may run, or back to the launcher after the last.
    void next() {
        if (ready.empty()) {
            if (done != int(fibers.size())) {
                std::fputs("emulator: all threads wait for others\n", stderr);
                std::abort();
            }
            setcontext(&launcher);
        }
        const size_t index = draw() % ready.size();
        const int from = current, to = ready[index];
        ready[index] = ready.back();
        ready.pop_back();
        if (to != from) {
            current = to;
            swapcontext(&fibers[from].context, &fibers[to].context);
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
alignas(128) inline uint8_t memory[SHARED];
// By chunks of 16 bytes.
inline bool published[SHARED / 16];

// A thread's numbers; they follow the fiber that runs.
struct ThreadIndex {
    struct X {
        operator uint32_t() const { return block->current; }
    } x;
};

inline void enter() {
    block->kernel();
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
            block = &own;
            blockIdx = {x, y, 0};
            std::memset(memory, 0xff, SHARED);
            std::memset(published, 0, sizeof published);
            for (uint32_t i = 0; i < threads; ++i) {
                Fiber &fiber = own.fibers[i];
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.get();
                fiber.context.uc_stack.ss_size = STACK;
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, enter, 0);
                if (i) {
                    own.ready.push_back(i);
                }
            }
            own.current = 0;
            swapcontext(&own.launcher, &own.fibers[0].context);
        }
    }
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

template <typename T> T __ldg(const T *at) { return *at; }
template <typename T> void __stcs(T *at, T value) { *at = value; }

using std::min;

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
