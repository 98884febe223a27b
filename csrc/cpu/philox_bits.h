// A stretch of a Philox stream (layout in philox.h) at the vector width of the level being compiled.
// Integer arithmetic only: the same bits at every level, for every way of cutting a stream.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"
#include "philox.h"

namespace flcore {
namespace FLCORE_ISA {

// One 32-bit word a 64-bit lane, in its low half; the high half may hold anything, because the
// multiply does not read it. So a round needs no masks and no blends.
typedef uint64_t PhiloxWords __attribute__((vector_size(VEC_BYTES)));
constexpr int PHILOX_GROUP = LANES64;  // blocks side by side

FLCORE_INLINE PhiloxWords philox_splat(uint32_t x) { return PhiloxWords{} + x; }

// low halves, 32 x 32 -> 64
FLCORE_INLINE PhiloxWords philox_multiply(const PhiloxWords& a, const PhiloxWords& b) {
#if defined(__AVX512F__)
  return (PhiloxWords)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (PhiloxWords)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (PhiloxWords)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// PHILOX_GROUP consecutive blocks; two words a lane of `low` (words 0, 1) and `high` (words 2, 3).
FLCORE_INLINE void philox_blocks(const PhiloxStream& s, uint32_t first, PhiloxWords& low,
                                 PhiloxWords& high) {
  PhiloxWords c0 = philox_splat(first), c1 = philox_splat(s.tensor), c2 = philox_splat(s.round),
              c3 = philox_splat(s.client);
  for (int l = 0; l < PHILOX_GROUP; ++l) c0[l] += uint64_t(l);
  PhiloxKey key = {s.k0, s.k1};
  for (int r = 0; r < PHILOX_ROUNDS; ++r, philox_bump(key)) {
    const PhiloxWords p0 = philox_multiply(c0, philox_splat(PHILOX_M0));
    const PhiloxWords p1 = philox_multiply(c2, philox_splat(PHILOX_M1));
    c0 = (p1 >> 32) ^ c1 ^ philox_splat(key.k0);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ philox_splat(key.k1);
    c3 = p0;
  }
  low = (c0 & 0xffffffffu) | (c1 << 32);
  high = (c2 & 0xffffffffu) | (c3 << 32);
}

struct PhiloxRaw {
  FLCORE_INLINE uint32_t of(uint32_t bits) { return bits; }
};

// out[j] = Form::of(element offset + j), 0 <= j < count
template <class Form>
FLCORE_INLINE void philox_fill(const PhiloxStream& s, int64_t offset, int64_t count,
                               uint32_t* out) {
  int64_t j = 0;
  while (j < count) {
    const int64_t i = offset + j;  // position in the stream
    if ((i & 3) == 0 && j + 4 * PHILOX_GROUP <= count) {
      PhiloxWords low, high;
      philox_blocks(s, uint32_t(i >> 2), low, high);
      uint64_t pairs[2 * PHILOX_GROUP];
      for (int l = 0; l < PHILOX_GROUP; ++l) {
        pairs[2 * l] = low[l];
        pairs[2 * l + 1] = high[l];
      }
      uint32_t bits[4 * PHILOX_GROUP];
      __builtin_memcpy(bits, pairs, sizeof bits);
      for (int k = 0; k < 4 * PHILOX_GROUP; ++k) bits[k] = Form::of(bits[k]);
      __builtin_memcpy(out + j, bits, sizeof bits);
      j += 4 * PHILOX_GROUP;
      continue;
    }
    const PhiloxBlock b = philox_block(s, uint32_t(i >> 2));
    for (int k = int(i & 3); k < 4 && j < count; ++k, ++j) store(out + j, Form::of(b.w[k]));
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
