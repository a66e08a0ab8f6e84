// cuda/tensor_copy.cuh on the emulator, written from the PTX manual's tensor copies.
#pragma once

#include <barrier.cuh>

// A tensor [rows, heads, columns] of 2-byte elements, with strides in elements, and the boxes that are copied from it.
struct CUtensorMap {
    const uint16_t *start;
    int64_t rows, heads, columns, row, head;
    int box_rows, box_heads;
};

inline void arrive_expecting(uint32_t at, uint32_t bytes) {
    emulator::Phased &barrier = emulator::block->phased_at(at);
    barrier.bytes += bytes;
    barrier.arrive();
}

inline void copy_box(uint32_t to, const CUtensorMap &map, int column, int head, int row, uint32_t barrier) {
    const int lines = map.box_rows * map.box_heads;
    if (to % 128 || to + 128 * lines > emulator::SHARED) {
        std::fprintf(stderr, "emulator: a box to %u\n", to);
        std::abort();
    }
    std::vector<emulator::Copy> copies;
    for (int at = 0; at < 8 * lines; ++at) {
        const int64_t r = row + at / 8 / map.box_heads, h = head + at / 8 % map.box_heads, c = column + at % 8 * 8;
        const bool valid = r < map.rows && h < map.heads && c < map.columns;
        const uint32_t plain = to + 16 * at;
        const void *from = valid ? map.start + r * map.row + h * map.head + c : nullptr;
        copies.push_back({plain ^ (plain >> 7 & 7) << 4, from, valid, 16});
    }
    emulator::block->flights.push_back({emulator::ENGINE, barrier, std::move(copies)});
}
