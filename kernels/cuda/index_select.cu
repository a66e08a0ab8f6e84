// Rows by index: out[i] = x[ids[i]], whatever a row holds. A row is `units` units of sizeof(Unit) bytes.
//
// Neighbouring lanes copy neighbouring units; a row has `lanes` lanes, a power of two up to a warp's 32, and each lane
// has four loads in flight. Up to three matrices are read in one launch, blockIdx.y of them.

#include <cstdint>

namespace {

template <typename Unit, typename Id>
__device__ void index_select(const Unit *x, const Id *ids, Unit *out, uint64_t num_ids, uint32_t units, uint32_t lanes) {
    const uint32_t lane = threadIdx.x % lanes;
    const uint64_t row = uint64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    if (row >= num_ids) {
        return;
    }
    const Unit *from = x + uint64_t(ids[row]) * units;
    Unit *to = out + row * units;
    uint32_t unit = lane;
    for (; uint64_t(unit) + 3 * lanes < units; unit += 4 * lanes) {
        const Unit a = __ldg(from + unit), b = __ldg(from + unit + lanes);
        const Unit c = __ldg(from + unit + 2 * lanes), d = __ldg(from + unit + 3 * lanes);
        to[unit] = a;
        to[unit + lanes] = b;
        to[unit + 2 * lanes] = c;
        to[unit + 3 * lanes] = d;
    }
    for (; unit < units; unit += lanes) {
        to[unit] = __ldg(from + unit);
    }
}

} // namespace

#define INDEX_SELECT(NAME, UNIT, ID)                                                                                 \
    extern "C" __global__ void NAME(const UNIT *x0, const UNIT *x1, const UNIT *x2, const ID *ids, UNIT *out0,       \
                                    UNIT *out1, UNIT *out2, uint64_t num_ids, uint32_t units0, uint32_t units1,      \
                                    uint32_t units2, uint32_t lanes) {                                               \
        const UNIT *x = blockIdx.y == 0 ? x0 : blockIdx.y == 1 ? x1 : x2;                                            \
        UNIT *out = blockIdx.y == 0 ? out0 : blockIdx.y == 1 ? out1 : out2;                                          \
        const uint32_t units = blockIdx.y == 0 ? units0 : blockIdx.y == 1 ? units1 : units2;                         \
        index_select<UNIT, ID>(x, ids, out, num_ids, units, lanes);                                                  \
    }

#define INDEX_SELECTS(SUFFIX, UNIT)                                                                                  \
    INDEX_SELECT(index_select_##SUFFIX##_u32, UNIT, uint32_t)                                                        \
    INDEX_SELECT(index_select_##SUFFIX##_i64, UNIT, int64_t)

INDEX_SELECTS(1, uint8_t)
INDEX_SELECTS(2, uint16_t)
INDEX_SELECTS(4, uint32_t)
INDEX_SELECTS(8, uint2)
INDEX_SELECTS(16, uint4)
