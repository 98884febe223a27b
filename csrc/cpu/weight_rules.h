// Scales and codes of one group of weights. The rules are told in
// python/flcore/reference/weight_rules.py, whose float32 arithmetic this repeats operation by
// operation: one division a weight, no fma. Errors are summed in 16 lanes and a tree.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/fp8.h"
#include "cpu/int_lanes.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int ERROR_LANES = 16;
constexpr int PARTS = ERROR_LANES / LANES;

// What a rule reads of a group, or of the whole weight.
struct Range {
  float least, most, top, extreme;  // extreme: the first value of magnitude top, with its sign
};

struct GroupScale {
  float scale, divisor;  // as stored; the same, or 1 for 0
  float exact;           // before it was rounded to its storage type, or 1 for 0 (q8_0)
  float inverse;         // 1 / exact, or 0 (q4_0)
  float sub;             // taken from a weight before it is divided
  float offset, zero;    // added to what rounds; what is stored
};

enum CodePath : int {
  PATH_LINEAR,
  PATH_SHIFTED,
  PATH_Q4_0,
  PATH_Q8_0,
  PATH_TABLE,
  PATH_E4M3,
  PATH_E5M2
};

inline CodePath code_path(const WeightQuantArgs& a) {
  if (a.rule == WEIGHT_Q4_0) return PATH_Q4_0;
  if (a.rule == WEIGHT_Q8_0) return PATH_Q8_0;
  if (a.kind == QW_FLOAT_ZERO) return PATH_SHIFTED;
  if (a.kind == QW_TABLE) return PATH_TABLE;
  return a.kind == QW_E4M3 ? PATH_E4M3 : a.kind == QW_E5M2 ? PATH_E5M2 : PATH_LINEAR;
}

// ---- numbers of a storage type ---------------------------------------------------------------

inline float rounded(float x, int dtype) {
  if (dtype == F16) return f16_to_f32(f32_to_f16(x));
  return dtype == BF16 ? bf16_to_f32(f32_to_bf16(x)) : x;
}

inline float smallest(int dtype) {
  return dtype == F16 ? 0x1p-24f : float_of(dtype == BF16 ? 0x10000u : 1u);
}

// Integers in the order of floats; its own inverse. -0 comes before 0, NaNs at the ends.
FLCORE_INLINE vi32 ordered(const vi32& x) { return x ^ ((x >> 31) & 0x7fffffff); }
FLCORE_INLINE float from_ordered(int32_t x) {
  return float_of(uint32_t(x ^ ((x >> 31) & 0x7fffffff)));
}

FLCORE_INLINE vf32 limited(const vf32& x, const vf32& low, const vf32& high) {
  const vf32 y = x > low ? x : low;
  return y < high ? y : high;
}

// ---- one group: the scale --------------------------------------------------------------------

// 2^e with e from the largest magnitude of a group
inline float power_scale(const WeightQuantArgs& a, float top) {
  if (!(top > 0)) return 0;
  if (a.rule == WEIGHT_EVEN) {
    const int mantissa = a.kind == QW_E4M3 ? 3 : a.kind == QW_E5M2 ? 2 : 1;
    const uint32_t u = (bits_of(top) + (1u << (22 - mantissa))) & 0x7f800000u;
    top = float_of(u < 0x7f000000u ? u : 0x7f000000u);
  }
  if (a.rule == WEIGHT_RCEIL) top /= a.largest;
  if (!(top > 0)) return 0;
  int less = 0;
  if (top < 0x1p-126f) {  // so that the exponent can be read off
    top *= 0x1p24f;
    less = 24;
  }
  int e = int(bits_of(top) >> 23) - 127 - less;
  if ((a.rule == WEIGHT_CEIL || a.rule == WEIGHT_RCEIL) && (bits_of(top) & 0x7fffffu)) ++e;
  if (a.rule != WEIGHT_RCEIL) e -= int(bits_of(a.largest) >> 23) - 127;
  e = e < -126 ? -126 : e > 127 ? 127 : e;
  return float_of(uint32_t(e + 127) << 23);
}

inline GroupScale group_scale(const WeightQuantArgs& a, const Range& range, float factor) {
  const float most_code = float((1 << a.bits) - 1), half = float(1 << (a.bits - 1));
  float exact, least = 0;
  switch (a.rule) {
    case WEIGHT_MIN_MAX: {
      least = range.least;
      float most = range.most;
      if (a.force_zero) {
        least = least < 0 ? least : 0;
        most = most > 0 ? most : 0;
      }
      least = least * factor + 0.0f;
      most = most * factor;
      const float width = most - least;
      exact = (width > a.range_floor ? width : a.range_floor) / most_code;
      break;
    }
    case WEIGHT_CENTRED:
      exact = range.top * factor / (most_code / 2);
      break;
    case WEIGHT_ABSMAX:
      exact = range.top * factor / a.largest;
      break;
    case WEIGHT_Q4_0:
      exact = range.extreme * factor / -half;
      break;
    case WEIGHT_NARROW:
    case WEIGHT_Q8_0:
      exact = range.top * factor / (half - 1);
      break;
    default:
      exact = power_scale(a, range.top) * factor;
  }
  GroupScale g;
  g.scale = rounded(exact, a.scale_dtype);
  if (g.scale == 0 && exact != 0)
    g.scale = exact < 0 ? -smallest(a.scale_dtype) : smallest(a.scale_dtype);
  g.divisor = g.scale == 0 ? 1 : g.scale;
  g.exact = exact == 0 ? 1 : exact;
  g.inverse = a.rule != WEIGHT_Q4_0 || exact == 0 ? 0 : 1 / exact;
  g.sub = 0;
  g.offset = half;
  g.zero = 0;
  if (a.rule == WEIGHT_MIN_MAX && a.kind == QW_INT) {
    const float z = -__builtin_rintf(least / g.divisor);
    g.zero = g.offset = z > 0 ? z < most_code ? z : most_code : 0;
  } else if (a.rule == WEIGHT_MIN_MAX) {
    g.zero = g.sub = rounded(least + half * g.scale, a.scale_dtype);
  }
  return g;
}

// ---- LANES codes -----------------------------------------------------------------------------

// How many of the 15 limits v exceeds.
FLCORE_INLINE vi32 limits_below(const float* limits, const vf32& v) {
#if defined(__AVX512F__)
  vi32 i{};
  unroll<4>([&](auto c) FLCORE_LAMBDA {
    constexpr int STEP = 8 >> c.value;
    const vi32 above = v > look_up(limits, i + (STEP - 1));
    i += above & STEP;
  });
  return i;
#else
  vi32 i{};
  for (int j = 0; j < 15; ++j) i -= (vi32)(v > limits[j]);
  return i;
#endif
}

FLCORE_INLINE vi32 fp8_codes(const vf32& v, int mantissa, int32_t lowest, int32_t top,
                             float largest) {
  const vf32 absolute = (vf32)((vi32)v & 0x7fffffff), most = vf32{} + largest;
  const vf32 y = absolute < most ? absolute : most;
  vi32 e = (vi32)y & 0x7f800000;
  e = e > lowest ? e : vi32{} + lowest;
  const vf32 z = y * (vf32)((uint32_t(254 + mantissa) << 23) - (vu32)e);  // 2^(mantissa - exponent)
  const vi32 k = (vi32)(z + 0x1p23f) - 0x4b000000;                        // rounded to even
  vi32 code = k + ((e - lowest) >> (23 - mantissa));
  code = code < top ? code : vi32{} + top;
  return code | (((vi32)v >> 24) & 0x80);
}

// What a loop over a group needs, in registers: bytes that it stores could otherwise be any of it.
template <int PATH>
struct GroupCodes {
  static constexpr bool LINEAR = PATH == PATH_LINEAR || PATH == PATH_SHIFTED;
  vf32 sub, divisor, offset, least, most, scale, zero;
  vi32 shift;
  const float* limits;
  const float* sorted;

  FLCORE_MEMBER GroupCodes(const WeightQuantArgs& a, const GroupScale& g)
      : sub(vf32{} + g.sub),
        divisor(vf32{} + (PATH == PATH_Q4_0   ? g.inverse
                          : PATH == PATH_Q8_0 ? g.exact
                                              : g.divisor)),
        offset(vf32{} + (PATH == PATH_Q4_0 ? g.offset + 0.5f : g.offset)),
        least(vf32{} + ((a.rule == WEIGHT_NARROW || PATH == PATH_Q8_0 ? 1.0f : 0.0f) -
                        (LINEAR ? g.offset : 0))),
        most(vf32{} + (float((1 << a.bits) - 1) - (LINEAR ? g.offset : 0))),
        scale(vf32{} + g.scale),
        zero(vf32{} + g.zero),
        shift(vi32{} + int32_t(g.offset)),
        limits(a.limits),
        sorted(a.sorted) {}

  // Codes less `shift` on the linear paths. Limits are whole numbers: it is the same whether they
  // are applied before or after rounding. PATH_TABLE gives positions among the sorted levels.
  FLCORE_MEMBER vi32 of(const vf32& w) const {
    if constexpr (LINEAR) {
      return to_nearest(limited((PATH == PATH_SHIFTED ? w - sub : w) / divisor, least, most));
    } else if constexpr (PATH == PATH_Q4_0) {
      return __builtin_convertvector(limited(w * divisor + offset, least, most), vi32);  // cuts off
    } else if constexpr (PATH == PATH_Q8_0) {
      const vf32 v = limited(w / divisor, vf32{} - 1024, vf32{} + 1024);
      const vf32 whole = __builtin_convertvector(__builtin_convertvector(v, vi32), vf32);
      const vf32 rest = v - whole;
      const vf32 up = (vf32)((vi32)(rest >= 0.5f) & (vi32)(vf32{} + 1));
      const vf32 down = (vf32)((vi32)(rest <= -0.5f) & (vi32)(vf32{} + 1));
      return __builtin_convertvector(limited(whole + up - down + offset, least, most), vi32);
    } else if constexpr (PATH == PATH_TABLE) {
      return limits_below(limits, w / divisor);
    } else {
      return PATH == PATH_E4M3 ? fp8_codes(w / divisor, 3, (127 - 6) << 23, 0x7e, 448.0f)
                               : fp8_codes(w / divisor, 2, (127 - 14) << 23, 0x7b, 57344.0f);
    }
  }

  // What the codes stand for.
  FLCORE_MEMBER vf32 values(const vi32& q) const {
    vf32 level;
    if constexpr (PATH == PATH_TABLE)
      level = look_up(sorted, q);
    else if constexpr (PATH == PATH_E4M3 || PATH == PATH_E5M2)
      level = fp8_values(q, fp8_of(PATH == PATH_E4M3 ? QW_E4M3 : QW_E5M2));
    else if constexpr (LINEAR)
      level = __builtin_convertvector(q, vf32);
    else
      level = __builtin_convertvector(q - shift, vf32);
    const vf32 v = level * scale;
    return PATH == PATH_SHIFTED ? v + zero : v;
  }
};

// ---- one group -------------------------------------------------------------------------------

// Sum of squared errors of n weights; w has whole multiples of 16 values.
template <int PATH>
float group_error(const WeightQuantArgs& a, const GroupScale& g, const float* w, int64_t n) {
  const GroupCodes<PATH> codes(a, g);
  vf32 lanes[PARTS] = {};
  for (int64_t i = 0; i < n; i += ERROR_LANES) {
    for (int p = 0; p < PARTS; ++p) {
      const vf32 x = load<vf32>(w + i + p * LANES);
      vf32 d = x - codes.values(codes.of(x));
      if (i + ERROR_LANES > n)
        for (int l = 0; l < LANES; ++l)
          if (i + p * LANES + l >= n) d[l] = 0;
      lanes[p] += d * d;
    }
  }
  float sums[ERROR_LANES];
  for (int p = 0; p < PARTS; ++p) store(sums + p * LANES, lanes[p]);
  for (int half = ERROR_LANES / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

// Codes of n weights, whole multiples of 16; more bytes than n may be written, up to that multiple.
template <int PATH>
void group_codes(const WeightQuantArgs& a, const GroupScale& g, const float* w, int64_t n,
                 uint8_t* out) {
  const GroupCodes<PATH> codes(a, g);
  const float* order = a.order;
  for (int64_t i = 0; i < n; i += LANES) {
    vi32 q = codes.of(load<vf32>(w + i));
    if constexpr (codes.LINEAR) q += codes.shift;
    if constexpr (PATH == PATH_TABLE) q = __builtin_convertvector(look_up(order, q), vi32);
    store_u8(out + i, q);
  }
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
