// Counts and places of a packed weight (layout tile16, csrc/api.h), for the products with it.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"

namespace flcore {
namespace FLCORE_ISA {

FLCORE_INLINE int64_t block_count(const QWeight& w) { return (w.n + 15) / 16; }
FLCORE_INLINE int64_t chunk_count(const QWeight& w) { return (w.k + 31) / 32; }
FLCORE_INLINE int64_t group_count(const QWeight& w) {
  return w.group < w.k ? (w.k + w.group - 1) / w.group : w.k > 0;
}

FLCORE_INLINE int64_t block_bytes(const QWeight& w) { return chunk_count(w) * 64 * w.bits; }
FLCORE_INLINE const uint8_t* block_codes(const QWeight& w, int64_t block) {
  return w.codes + block * block_bytes(w);
}

// Rows n0 .. n0 + width - 1 of up [n, rank] as [rank][width], zeros behind n: one load has a column
// for all of them.
[[maybe_unused]] FLCORE_NOINLINE static void turn_up(const QMatmulArgs& a, int64_t n0,
                                                     int64_t width, float* to) {
  for (int64_t r = 0; r < width; ++r)
    for (int64_t i = 0; i < a.rank; ++i)
      to[i * width + r] = n0 + r < a.w.n ? a.up[(n0 + r) * a.rank + i] : 0.0f;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
