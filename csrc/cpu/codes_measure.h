// Statistics of a bucket that scales follow from: sums in float64, largest magnitude, both ends.
// A sum has 16 lanes (lane c % 16 takes coordinate c), and then lanes 8, 4, 2 and 1 apart are added:
// the same bits at every level, and wherever the values come from.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/codes.h"
#include "cpu/int_lanes.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int SUM_LANES = 16;

struct SumMagnitudes {
  FLCORE_MEMBER vf64 many(const vf64& x) const {
    return (vf64)((vi64)x & int64_t(0x7fffffffffffffff));
  }
  FLCORE_MEMBER double one(double x) const { return x < 0 ? -x : x; }
};
struct SumSquares {
  FLCORE_MEMBER vf64 many(const vf64& x) const { return x * x; }
  FLCORE_MEMBER double one(double x) const { return x * x; }
};
struct SumNegative {
  FLCORE_MEMBER vf64 many(const vf64& x) const { return x < 0 ? x : vf64{}; }
  FLCORE_MEMBER double one(double x) const { return x < 0 ? x : 0; }
};
struct SumPositive {
  FLCORE_MEMBER vf64 many(const vf64& x) const { return x > 0 ? x : vf64{}; }
  FLCORE_MEMBER double one(double x) const { return x > 0 ? x : 0; }
};
struct CountNegative {
  FLCORE_MEMBER vf64 many(const vf64& x) const { return x < 0 ? vf64{} + 1.0 : vf64{}; }
  FLCORE_MEMBER double one(double x) const { return x < 0 ? 1 : 0; }
};

// A sum in the making: 16 values at a time, then what is left over. Members are not arrays of lanes
// until the end, so that they can live in registers.
template <class Term>
struct TermSum {
  static constexpr int PARTS = SUM_LANES / LANES64;
  vf64 parts[PARTS] = {};

  FLCORE_MEMBER void add(const float* u) {
    unroll<PARTS>([&](auto k) FLCORE_LAMBDA {
      constexpr int K = decltype(k)::value;
      parts[K] = parts[K] + Term().many(load_f64<F32>(u, K * LANES64));
    });
  }
  FLCORE_MEMBER double total(const float* u, int64_t left) const {  // left < SUM_LANES
    double lanes[SUM_LANES];
    __builtin_memcpy(lanes, parts, sizeof lanes);
    for (int64_t i = 0; i < left; ++i) lanes[i] += Term().one(double(load<float>(u + i)));
    for (int apart = SUM_LANES / 2; apart; apart /= 2)
      for (int k = 0; k < apart; ++k) lanes[k] += lanes[k + apart];
    return lanes[0];
  }
};

template <class Term>
static double lane_sum(const float* u, int64_t n) {
  TermSum<Term> sums;
  int64_t i = 0;
  for (; i + SUM_LANES <= n; i += SUM_LANES) sums.add(u + i);
  return sums.total(u + i, n - i);
}

// Magnitudes are compared as integers, the bits of |x|: then a NaN is the largest of all.
static float largest_magnitude(const float* u, int64_t n) {
  vi32 a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const vi32 x = load<vi32>(u + i) & 0x7fffffff, y = load<vi32>(u + i + LANES) & 0x7fffffff;
    a = x > a ? x : a;
    b = y > b ? y : b;
  }
  int32_t top = highest(b > a ? b : a);
  for (; i < n; ++i) {
    const int32_t x = load<int32_t>(u + i) & 0x7fffffff;
    top = x > top ? x : top;
  }
  return float_of(uint32_t(top));
}

// What the scale of a bucket of sign, uniform or ternary codes follows from.
struct Measured {
  float top;   // the largest magnitude
  double sum;  // of magnitudes or of squares, whichever summed() names
};

enum Summed : int { SUMMED_NONE, SUMMED_MAGNITUDES, SUMMED_SQUARES };

static inline Summed summed(const CodecArgs& c) {
  if (c.codec == CODEC_TERNARY) return c.clip > 0 ? SUMMED_SQUARES : SUMMED_NONE;
  if (c.measure == MEASURE_L2) return SUMMED_SQUARES;
  return c.codec == CODEC_SIGN ? SUMMED_MAGNITUDES : SUMMED_NONE;
}

static inline Measured measured(const BucketJob& job) {
  const Summed kind = summed(job.c);
  const bool top = job.c.codec == CODEC_TERNARY || kind == SUMMED_NONE;
  return {top ? largest_magnitude(job.u, job.n) : 0,
          kind == SUMMED_MAGNITUDES ? lane_sum<SumMagnitudes>(job.u, job.n)
          : kind == SUMMED_SQUARES  ? lane_sum<SumSquares>(job.u, job.n)
                                    : 0};
}

struct Ends {
  float low, high;
};

static inline Ends ends_of(const float* u, int64_t n) {
  Ends e = {load<float>(u), load<float>(u)};
  int64_t i = 0;
  if (n >= LANES) {
    vf32 low = load<vf32>(u), high = low;
    for (; i + LANES <= n; i += LANES) {
      const vf32 x = load<vf32>(u + i);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    for (int k = 0; k < LANES; ++k) {
      e.low = low[k] < e.low ? low[k] : e.low;
      e.high = high[k] > e.high ? high[k] : e.high;
    }
  }
  for (; i < n; ++i) {
    const float x = load<float>(u + i);
    e.low = x < e.low ? x : e.low;
    e.high = x > e.high ? x : e.high;
  }
  e.low = e.low + 0.0f;  // -0 and 0 are equal: which one was met first must not show
  return e;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
