// cuda/warp.cuh on the emulator, written from the PTX manual's tables of fragments.
#pragma once

#include <half.cuh>

inline uint8_t *shared_memory() { return emulator::memory; }

inline uint32_t shared_address(const void *pointer) {
    return uint32_t(static_cast<const uint8_t *>(pointer) - emulator::memory);
}

inline void copy16(uint32_t to, const void *from, bool valid) {
    if (to % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16) || to + 16 > emulator::SHARED) {
        std::fprintf(stderr, "emulator: copy of 16 bytes to %u from %p\n", to, from);
        std::abort();
    }
    emulator::fiber().open.push_back({to, from, valid, 16});
}

inline void commit() {
    emulator::Fiber &own = emulator::fiber();
    own.groups.push_back(std::move(own.open));
    own.open.clear();
}

template <int PENDING> void wait() {
    auto &groups = emulator::fiber().groups;
    while (groups.size() > PENDING) {
        for (const emulator::Copy &one : groups.front()) {
            emulator::copy(one, emulator::block->current);
        }
        groups.erase(groups.begin());
    }
}

inline void store4(uint32_t to, uint32_t value) {
    std::memcpy(emulator::memory + to, &value, 4);
    emulator::chunks[to / 16] = {++emulator::now, emulator::block->current, false};
}

inline float power_of_two(float x) { return std::exp2(x); }

// The address of row `row` of matrix `matrix`, as its lane has shown it.
inline const uint16_t *matrix_row(const uint32_t (*shown)[8], int matrix, int row) {
    return reinterpret_cast<const uint16_t *>(emulator::memory + shown[8 * matrix + row][0]);
}

inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
    const auto shown = emulator::show({address});
    for (int matrix = 0; matrix < 4; ++matrix) {
        const uint16_t *row = matrix_row(shown, matrix, emulator::lane() / 4);
        std::memcpy(&to[matrix], row + 2 * (emulator::lane() % 4), 4);
    }
}

inline void load_transposed(uint32_t (&to)[4], uint32_t address) {
    const auto shown = emulator::show({address});
    for (int matrix = 0; matrix < 4; ++matrix) {
        const int column = emulator::lane() / 4, row = 2 * (emulator::lane() % 4);
        to[matrix] = matrix_row(shown, matrix, row)[column] | uint32_t(matrix_row(shown, matrix, row + 1)[column]) << 16;
    }
}

template <typename T> void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto shown = emulator::show({a[0], a[1], a[2], a[3], b0, b1});
    const int group = emulator::lane() / 4, own = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        // c[i] is element (group + 8 * (i / 2), 2 * own + i % 2) of 16 x 8.
        const int column = 2 * own + i % 2;
        for (int k = 0; k < 16; k += 2) {
            const uint32_t row_bits = shown[4 * group + k / 2 % 4][i / 2 + 2 * (k / 8)];
            const uint32_t column_bits = shown[4 * column + k / 2 % 4][4 + k / 8];
            const float2 x = Half<T>::unpack(row_bits), y = Half<T>::unpack(column_bits);
            c[i] += x.x * y.x + x.y * y.y;
        }
    }
}
