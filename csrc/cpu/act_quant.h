// Dynamic quantisation of activations to 8 bits: x is close to scale (q - zero), one scale for a
// block of a row.
//   symmetric    scale = absmax / 127,       q = rne(x (127 / absmax)), zero 0
//   asymmetric   scale = (high - low) / 255, zero = rne(-low / scale), q = rne(x / scale) + zero,
//                with low <= 0 <= high; here codes and zero are 128 less, in -128 .. 127
// all in float32, with the inverse of the scale rounded once. Blocks below 2^-64 are measured in
// units of 2^-64, where the inverse is in range. A block of zeros has scale 0 and codes 0; one with
// a value that is not finite has scale NaN and codes equal to the zero point.
#pragma once

#include <cstdint>

#include "cpu/int_lanes.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

struct ActScale {
  float scale, shift, inverse;  // q = rne((x shift) inverse) + zero
  int32_t zero;
};

FLCORE_INLINE int32_t nearest1(float x) {
  const vf32 v = vf32{} + x;
  return to_nearest(v)[0];
}

FLCORE_INLINE int32_t clip_byte(int32_t q) { return q < -128 ? -128 : q > 127 ? 127 : q; }

// `top`: the largest |x| as bits, which order as the values do, infinity and NaN last.
FLCORE_INLINE ActScale act_scale(uint32_t top, float low, float high, bool asymmetric) {
  if (top >= 0x7f800000u) return {float_of(0x7fc00000u), 0.0f, 0.0f, 0};
  if (top == 0) return {0.0f, 0.0f, 0.0f, 0};
  const float absmax = float_of(top);
  const bool small = absmax < 0x1p-64f;
  const float shift = small ? 0x1p64f : 1.0f, back = small ? 0x1p-64f : 1.0f;
  if (!asymmetric) {
    const float a = absmax * shift;
    return {(a / 127.0f) * back, shift, 127.0f / a, 0};
  }
  const float range = high * shift * 0.5f - low * shift * 0.5f;  // high - low may be out of range
  const float inverse = 127.5f / range;
  const int32_t zero = clip_byte(nearest1(-(low * shift) * inverse) - 128);
  return {(range / 127.5f) * back, shift, inverse, zero};
}

// Largest |x| of x[first .. first + n - 1], and for asymmetric codes the least and largest value.
template <int D>
static ActScale measure_block(const void* x, int64_t first, int64_t n, bool asymmetric) {
  vi32 top = {};
  vf32 low = {}, high = {};
  const int64_t whole = n / LANES * LANES;
  int64_t i = 0;
  if (asymmetric) {
    for (; i < whole; i += LANES) {
      const vf32 v = load_f32<D>(x, first + i);
      const vi32 a = (vi32)v & 0x7fffffff;
      top = a > top ? a : top;
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
  } else {
    for (; i < whole; i += LANES) {
      const vi32 a = (vi32)load_f32<D>(x, first + i) & 0x7fffffff;
      top = a > top ? a : top;
    }
  }
  uint32_t most = 0;
  float least = 0, largest = 0;
  for (int k = 0; k < LANES; ++k) {
    most = uint32_t(top[k]) > most ? uint32_t(top[k]) : most;
    least = low[k] < least ? low[k] : least;
    largest = high[k] > largest ? high[k] : largest;
  }
  for (; i < n; ++i) {
    const float v = load1<D>(x, first + i);
    const uint32_t a = bits_of(v) & 0x7fffffffu;
    most = a > most ? a : most;
    least = v < least ? v : least;
    largest = v > largest ? v : largest;
  }
  return act_scale(most, least, largest, asymmetric);
}

// Writes n codes less the 128 of asymmetric ones; returns the sum of (code - zero).
template <int D>
static int32_t code_block(const void* x, int64_t first, int64_t n, const ActScale& s, int8_t* out) {
  if (s.inverse == 0.0f) {
    for (int64_t i = 0; i < n; ++i) out[i] = int8_t(s.zero);
    return 0;
  }
  vi32 sums = {};
  const int64_t whole = n / LANES * LANES;
  int64_t i = 0;
  for (; i < whole; i += LANES) {
    vi32 q = to_nearest(load_f32<D>(x, first + i) * s.shift * s.inverse) + s.zero;
    q = higher(lower(q, vi32{} + 127), vi32{} - 128);
    sums += q;
    store_i8(out + i, q);
  }
  int32_t sum = 0;
  for (int k = 0; k < LANES; ++k) sum += sums[k];
  for (; i < n; ++i) {
    const int32_t q = clip_byte(nearest1(load1<D>(x, first + i) * s.shift * s.inverse) + s.zero);
    sum += q;
    out[i] = int8_t(q);
  }
  return sum - int32_t(n) * s.zero;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
