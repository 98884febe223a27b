// Standard normals of a Philox stream, for kernels that make their noise where they use it.
// The transform and its constants are in box_muller.h; normal_tile writes 4 bytes a value and reads
// nothing. Element i depends on (stream, i) alone, so tiles of any size and place agree.
#pragma once

#include <cstdint>

#include "box_muller.h"
#include "cpu/isa.h"
#include "cpu/philox_bits.h"
#include "cpu/vec.h"
#include "philox.h"

namespace flcore {
namespace FLCORE_ISA {

// sqrt(-2 ln((word + 1) 2^-32))
FLCORE_INLINE vf32 normal_radius(const vu32& word) {
  // Above 1/2 the distance to 1 is converted, below it the number itself: either way the float
  // holds 24 significant bits of what the logarithm sees. `above` is all ones or zero.
  const vi32 above = (vi32)word >> 31;
  // 2^32 - 1 - word or word + 1
  const vi32 whole = (vi32)((word ^ (vu32)above) + 1u + (vu32)above);
  // word + 1 = 2^31 is negative in int32 and loses its sign again here
  const vi32 bits = (vi32)__builtin_convertvector(whole, vf32) & 0x7fffffff;
  // u1 = 2^exponent (1 + f), with 1 + f in [sqrt(1/2), sqrt(2)) below 1/2 and exponent 0 above it
  const vi32 shifted = bits + (0x3f800000 - 0x3f3504f3);
  const vi32 mantissa = (shifted & 0x7fffff) + 0x3f3504f3;
  const vi32 exponent = ((shifted >> 23) - (127 + 32)) & ~above;
  const vf32 f_below = (vf32)mantissa - 1.0f;
  const vf32 f_above = (vf32)bits * -0x1p-32f;
  const vf32 f = (vf32)(((vi32)f_above & above) | ((vi32)f_below & ~above));
  const vf32 e = __builtin_convertvector(exponent, vf32);
  const vf32 s = f / (f + 2.0f);
  const vf32 z = s * s;
  const vf32 p = ((z * ATANH_3 + ATANH_2) * z + ATANH_1) * z + ATANH_0;
  const vf32 half = s + s * (z * p);  // ln(1 + f) / 2
  const vf32 log = e * LN2_HI + (half * 2.0f + e * LN2_LO);
  return vsqrt(log * -2.0f);
}

// r cos(2 pi u) and r sin(2 pi u), u = (word >> 7) 2^-25
FLCORE_INLINE void normal_turn(const vf32& r, const vu32& word, vf32& z0, vf32& z1) {
  // quarter turns, and the rest x in [-1/2, 1/2) of one, a multiple of 2^-23
  const vu32 quarter = (word + (1u << 29)) >> 30;
  const vf32 x = __builtin_convertvector((vi32)(word << 2) >> 9, vf32) * 0x1p-23f;
  const vf32 y = x * x;
  const vf32 s = x * 1.5f + x * (((y * SIN_3 + SIN_2) * y + SIN_1) * y + SIN_0);
  const vf32 c = (((y * COS_4 + COS_3) * y + COS_2) * y + COS_1) * y + 1.0f;
  const vi32 odd = -(vi32)(quarter & 1u);
  const vi32 first = ((vi32)s & odd) | ((vi32)c & ~odd);
  const vi32 second = ((vi32)c & odd) | ((vi32)s & ~odd);
  z0 = r * (vf32)(first ^ (vi32)(((quarter + 1u) & 2u) << 30));
  z1 = r * (vf32)(second ^ (vi32)((quarter & 2u) << 30));
}

constexpr int NORMAL_GROUP = 4 * PHILOX_GROUP;  // values of one group of Philox blocks

// The values of a group of blocks, in stream order.
FLCORE_INLINE void normal_group(const PhiloxStream& stream, uint32_t block, float* out) {
  constexpr uint64_t LOW = 0xffffffffu;
  PhiloxWords low, high;  // a lane: words 0 and 1, words 2 and 3 of its block
  philox_blocks(stream, block, low, high);
  vf32 z0, z1;
  const vf32 r = normal_radius((vu32)((low & LOW) | (high << 32)));
  normal_turn(r, (vu32)((low >> 32) | (high & ~LOW)), z0, z1);
  const PhiloxWords a = (PhiloxWords)z0, b = (PhiloxWords)z1;
  low = (a & LOW) | (b << 32);
  high = (a >> 32) | (b & ~LOW);
  uint64_t pairs[2 * PHILOX_GROUP];
  for (int l = 0; l < PHILOX_GROUP; ++l) {
    pairs[2 * l] = low[l];
    pairs[2 * l + 1] = high[l];
  }
  __builtin_memcpy(out, pairs, sizeof pairs);
}

// out[j] = element offset + j of the stream, 0 <= j < m; 0 <= offset, offset + m <= 2^34.
static inline void normal_tile(const PhiloxStream& stream, int64_t offset, float* out, int64_t m) {
  int64_t j = 0;
  while (j < m) {
    const int64_t i = offset + j;
    const int64_t skip = i & 3;
    if (skip == 0 && m - j >= NORMAL_GROUP) {
      normal_group(stream, uint32_t(i >> 2), out + j);
      j += NORMAL_GROUP;
      continue;
    }
    float values[NORMAL_GROUP];  // the ends of the tile: a group of which a part is wanted
    normal_group(stream, uint32_t(i >> 2), values);
    const int64_t wanted = m - j < NORMAL_GROUP - skip ? m - j : NORMAL_GROUP - skip;
    __builtin_memcpy(out + j, values + skip, size_t(4 * wanted));
    j += wanted;
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
