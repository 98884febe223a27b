// The grid of THC codes (cpu/codes_thc.h) in the numbers that kernels need: float64, rounded once.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace flcore {
namespace FLCORE_ISA {

// m: coordinates of a block, filled up; total: of the update where one norm serves all, else m
FLCORE_INLINE double thc_root(int64_t m, int64_t total) {
  return __builtin_sqrt(double(total) / double(m));
}

// What makes p out of the transform of a block that was scaled by 2^(power - 127).
FLCORE_INLINE float thc_up(float norm, float clip, int g, int64_t m, int64_t total,
                           uint32_t power) {
  const uint64_t bits = uint64_t(power - 127 + 1023) << 52;
  double scale;
  __builtin_memcpy(&scale, &bits, 8);
  const double up = double(g) * thc_root(m, total) / (2.0 * (double(clip) * double(norm)) * scale);
  return up < 0x1p100 ? float(up) : 0x1p100f;  // finite: an update far above its norm is cut anyway
}

// What makes D out of the transform of 2 T - g.
FLCORE_INLINE double thc_down(float norm, float clip, int g, int64_t m, int64_t total) {
  return double(clip) * double(norm) / (double(g) * double(m) * thc_root(m, total));
}

}  // namespace FLCORE_ISA
}  // namespace flcore
