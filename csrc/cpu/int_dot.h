// Products of unsigned and signed bytes, summed by fours into int32 lanes. Exact, hence the same
// bits at every level: VNNI has one instruction for it; elsewhere codes of up to 4 bits go through
// int16 (2 * 15 * 128 fits), wider codes are split into even and odd bytes first.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
constexpr bool HAS_VNNI = true;
#else
constexpr bool HAS_VNNI = false;
#endif

// Sums that wrap come back into range with the terms that follow.
FLCORE_INLINE vi32 wrapping(const vi32& a, const vi32& b) { return (vi32)((vu32)a + (vu32)b); }

// acc + sum over i of w[4 lane + i] x[4 lane + i], w bytes without a sign, x bytes with one.
// Without WIDE w is at most 15.
template <bool WIDE>
FLCORE_INLINE vi32 dot4(const vi32& acc, const vi32& w, const vi32& x) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return (vi32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
  if constexpr (!WIDE) {
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);
    return wrapping(acc, (vi32)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8);
  const __m512i odd = _mm512_srai_epi16((__m512i)x, 8);
  const vi32 first = (vi32)_mm512_madd_epi16((__m512i)(w & 0x00ff00ff), even);
  const vi32 second = (vi32)_mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), odd);
  return wrapping(wrapping(acc, first), second);
#elif defined(__AVX2__)
  if constexpr (!WIDE) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    return wrapping(acc, (vi32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8);
  const __m256i odd = _mm256_srai_epi16((__m256i)x, 8);
  const vi32 first = (vi32)_mm256_madd_epi16((__m256i)(w & 0x00ff00ff), even);
  const vi32 second = (vi32)_mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), odd);
  return wrapping(wrapping(acc, first), second);
#elif defined(__SSSE3__)
  if constexpr (!WIDE) {
    const __m128i pairs = _mm_maddubs_epi16((__m128i)w, (__m128i)x);
    return wrapping(acc, (vi32)_mm_madd_epi16(pairs, _mm_set1_epi16(1)));
  }
  const __m128i even = _mm_srai_epi16(_mm_slli_epi16((__m128i)x, 8), 8);
  const __m128i odd = _mm_srai_epi16((__m128i)x, 8);
  const vi32 first = (vi32)_mm_madd_epi16((__m128i)(w & 0x00ff00ff), even);
  const vi32 second = (vi32)_mm_madd_epi16(_mm_srli_epi16((__m128i)w, 8), odd);
  return wrapping(wrapping(acc, first), second);
#else
  vu32 sum = (vu32)acc;
  for (int lane = 0; lane < LANES; ++lane)
    for (int i = 0; i < 4; ++i)
      sum[lane] += uint32_t(int32_t((uint32_t(w[lane]) >> (8 * i)) & 0xffu) *
                            int32_t(int8_t(uint32_t(x[lane]) >> (8 * i))));
  return (vi32)sum;
#endif
}

}  // namespace FLCORE_ISA
}  // namespace flcore
