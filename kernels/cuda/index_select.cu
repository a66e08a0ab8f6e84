// Rows by index: out[i] = x[ids[i]], whatever a row holds. A row is `units` units of sizeof(Unit) bytes.
//
// `lanes` lanes, a power of two up to a warp's 32, copy a chunk of a row: 4 * lanes units, neighbours beside each other, each
// lane with four loads in flight. A block copies one chunk of each of its rows, so that a few wide rows keep as many threads
// busy as many narrow ones. Rows are copied in slices of `chunks` chunks, that of all rows before the next: what is read
// several times is still in the cache. Up to three matrices are read in one launch, blockIdx.y of them.

#include <cstdint>

namespace {

template <typename Unit, typename Id>
__device__ void index_select(const Unit *x, const Id *ids, Unit *out, uint64_t num_ids, uint32_t units, uint32_t lanes,
                             uint32_t chunks, uint32_t row_blocks) {
    const uint32_t of_slice = blockIdx.x % chunks, others = blockIdx.x / chunks;
    const uint32_t row_block = others % row_blocks, slice = others / row_blocks;
    const uint64_t row = uint64_t(row_block) * (blockDim.x / lanes) + threadIdx.x / lanes;
    const uint64_t unit = (uint64_t(slice) * chunks + of_slice) * 4 * lanes + threadIdx.x % lanes;
    // The last slice may have fewer chunks, and rows that are not the widest end sooner.
    if (row >= num_ids || unit >= units) {
        return;
    }
    const Unit *from = x + uint64_t(ids[row]) * units + unit;
    Unit *to = out + row * units + unit;
    const uint32_t left = units - uint32_t(unit);
    // Guards on each load and store would do for all, but the compiler then puts stores between the loads.
    if (left > 3 * lanes) {
        const Unit a = __ldg(from), b = __ldg(from + lanes);
        const Unit c = __ldg(from + 2 * lanes), d = __ldg(from + 3 * lanes);
        // What is written goes from the cache first: what is read may be read again.
        __stcs(to, a);
        __stcs(to + lanes, b);
        __stcs(to + 2 * lanes, c);
        __stcs(to + 3 * lanes, d);
        return;
    }
    for (uint32_t i = 0; i < left; i += lanes) {
        __stcs(to + i, __ldg(from + i));
    }
}

} // namespace

#define INDEX_SELECT(NAME, UNIT, ID)                                                                                 \
    extern "C" __global__ void NAME(const UNIT *x0, const UNIT *x1, const UNIT *x2, const ID *ids, UNIT *out0,       \
                                    UNIT *out1, UNIT *out2, uint64_t num_ids, uint32_t units0, uint32_t units1,      \
                                    uint32_t units2, uint32_t lanes, uint32_t chunks, uint32_t row_blocks) {         \
        const UNIT *x = blockIdx.y == 0 ? x0 : blockIdx.y == 1 ? x1 : x2;                                            \
        UNIT *out = blockIdx.y == 0 ? out0 : blockIdx.y == 1 ? out1 : out2;                                          \
        const uint32_t units = blockIdx.y == 0 ? units0 : blockIdx.y == 1 ? units1 : units2;                         \
        index_select<UNIT, ID>(x, ids, out, num_ids, units, lanes, chunks, row_blocks);                              \
    }

#define INDEX_SELECTS(SUFFIX, UNIT)                                                                                  \
    INDEX_SELECT(index_select_##SUFFIX##_u32, UNIT, uint32_t)                                                        \
    INDEX_SELECT(index_select_##SUFFIX##_i64, UNIT, int64_t)

INDEX_SELECTS(1, uint8_t)
INDEX_SELECTS(2, uint16_t)
INDEX_SELECTS(4, uint32_t)
INDEX_SELECTS(8, uint2)
INDEX_SELECTS(16, uint4)
