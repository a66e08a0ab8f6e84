// cuda/warpgroup.cuh on the emulator, written from the PTX manual's matrix descriptors. Products read their factors from
// shared memory when they are issued and again when they are waited for, since the tensor cores may at any time between;
// both must find the same, published by the thread that wrote it or awaited from the copy engine. Between a wait and the next
// product must be `begin_products`.
#pragma once

#include <half.cuh>

inline uint32_t same_for_warp(uint32_t x) {
    const uint32_t first = emulator::show({x})[0][0];
    if (x != first) {
        std::fprintf(stderr, "emulator: %u and %u are not the same for a warp\n", x, first);
        std::abort();
    }
    return first;
}

inline uint32_t warpgroup() { return emulator::block->current / (4 * emulator::WARP); }

inline void publish() {
    for (emulator::Chunk &chunk : emulator::chunks) {
        chunk.published |= chunk.writer == emulator::block->current;
    }
}

inline void begin_products() { emulator::fiber().products_begun = true; }

// Products that are in no group are not waited for.
inline void commit_products() {
    emulator::Fiber &own = emulator::fiber();
    own.products.push_back(std::move(own.open_products));
    own.open_products.clear();
}

template <int PENDING> void wait_for_products() {
    emulator::fiber().products_begun = false;
    auto &groups = emulator::fiber().products;
    while (groups.size() > PENDING) {
        for (const auto &product : groups.front()) {
            product();
        }
        groups.erase(groups.begin());
    }
}

template <int COUNT> void shrink() {}
template <int COUNT> void grow() {}

inline void add_to(float *to, const float (&more)[4]) {
    for (int i = 0; i < 4; ++i) {
        to[i] += more[i];
    }
}

template <typename X, int N, int M> void settle(X (&)[N][M]) {}

inline uint64_t descriptor(uint32_t address, uint32_t panel) {
    return uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(panel / 16) << 16 | address / 16;
}

inline uint64_t further(uint64_t descriptor, uint32_t bytes) { return descriptor + bytes / 16; }

namespace emulator {

// What a descriptor says of the element at `address` when nothing is swizzled.
template <typename T> float read(uint64_t descriptor, uint32_t offset) {
    if (descriptor >> 62 != 1) {
        std::fputs("emulator: not a swizzle of 128 bytes\n", stderr);
        std::abort();
    }
    const uint32_t plain = (descriptor & 0x3fff) * 16 + offset;
    const uint32_t address = plain ^ (plain >> 7 & 7) << 4;
    const Chunk &chunk = chunks[address / 16];
    if (chunk.writer == ENGINE ? chunk.landed > fiber().awaited : !chunk.published) {
        std::fprintf(stderr, "emulator: the tensor cores read %u, which nobody published or awaited\n", address);
        std::abort();
    }
    uint16_t bits;
    std::memcpy(&bits, memory + address, 2);
    return Half<T>::unpack(bits).x;
}

inline uint32_t stride(uint64_t descriptor, int bit) { return (descriptor >> bit & 0x3fff) * 16; }

// Element (row, k) of a matrix whose rows lie in memory, by eights.
template <typename T> float of_rows(uint64_t descriptor, int row, int k) {
    return read<T>(descriptor, row % 8 * 128 + row / 8 * stride(descriptor, 32) + 2 * k);
}

// Element (k, column) of a matrix whose rows of 64 columns lie in memory, by eights.
template <typename T> float of_columns(uint64_t descriptor, int k, int column) {
    const uint32_t row = k % 8 * 128 + k / 8 * stride(descriptor, 32);
    return read<T>(descriptor, row + column / 64 * stride(descriptor, 16) + 2 * (column % 64));
}

// c (or 0, if FIRST) plus `product(row, column)`, by the thread's own elements of 16 rows for each warp.
template <bool FIRST, int N, typename F> void later(float (&c)[N][4], F product) {
    if (!fiber().products_begun) {
        std::fputs("emulator: a product before begin_products\n", stderr);
        std::abort();
    }
    const int lane = emulator::lane(), warp = block->current / WARP % 4;
    auto compute = [=](int i) {
        return product(16 * warp + lane / 4 + 8 * (i % 4 / 2), i / 4 * 8 + lane % 4 * 2 + i % 2);
    };
    std::vector<float> early(4 * N);
    for (int i = 0; i < 4 * N; ++i) {
        early[i] = compute(i);
    }
    fiber().open_products.push_back([=, &c] {
        for (int i = 0; i < 4 * N; ++i) {
            const float late = compute(i);
            if (std::memcmp(&early[i], &late, sizeof late)) {
                std::fputs("emulator: shared memory changed under the tensor cores\n", stderr);
                std::abort();
            }
            float &own = c[i / 4][i % 4];
            own = FIRST ? early[i] : own + early[i];
        }
    });
}

} // namespace emulator

template <typename T, bool FIRST, int N> void multiply_rows(float (&c)[N][4], uint64_t a, uint64_t b) {
    emulator::later<FIRST>(c, [=](int row, int column) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            sum += emulator::of_rows<T>(a, row, k) * emulator::of_rows<T>(b, column, k);
        }
        return sum;
    });
}

template <typename T, bool FIRST> void multiply_across(float (&c)[8][4], uint64_t a, uint64_t b) {
    emulator::later<FIRST>(c, [=](int row, int column) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            sum += emulator::of_columns<T>(a, k, row) * emulator::of_columns<T>(b, k, column);
        }
        return sum;
    });
}

template <typename T, int N> void multiply_columns(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b) {
    const auto shown = emulator::show({a[0], a[1], a[2], a[3]});
    // Of the thread's two rows.
    std::array<std::array<float, 16>, 2> rows;
    for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < 16; k += 2) {
            const int of = emulator::lane() / 4 * 4 + k / 2 % 4;
            const float2 pair = Half<T>::unpack(shown[of][half + 2 * (k / 8)]);
            rows[half][k] = pair.x, rows[half][k + 1] = pair.y;
        }
    }
    const std::array<uint32_t, 4> early{a[0], a[1], a[2], a[3]};
    emulator::fiber().open_products.push_back([early, &a] {
        if (std::memcmp(early.data(), a, sizeof a)) {
            std::fputs("emulator: a left factor changed under the tensor cores\n", stderr);
            std::abort();
        }
    });
    emulator::later<false>(c, [=](int row, int column) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            sum += rows[row % 16 / 8][k] * emulator::of_columns<T>(b, k, column);
        }
        return sum;
    });
}
