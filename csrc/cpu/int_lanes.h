// Vectors of int32: to and from bytes and float32, the larger of two, and a table of 16 by index.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// ---- LANES values of 8 bits ---------------------------------------------------------------------

FLCORE_INLINE vi32 load_u8(const void* p) {
#if defined(__AVX512F__)
  return (vi32)_mm512_maskz_cvtepu8_epi32(__mmask16(0xffff), load<__m128i>(p));
#elif defined(__AVX2__)
  return (vi32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
#elif defined(__SSE4_1__)
  return (vi32)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(load<int32_t>(p)));
#else
  vi32 x;
  for (int k = 0; k < LANES; ++k) x[k] = static_cast<const uint8_t*>(p)[k];
  return x;
#endif
}

// the low 8 bits of each value; what is above them is lost
FLCORE_INLINE void store_u8(uint8_t* p, const vi32& x) {
#if defined(__AVX512F__)
  store(p, _mm512_maskz_cvtepi32_epi8(__mmask16(0xffff), (__m512i)x));
#elif defined(__AVX2__)
  const __m256i low = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0c080400));
  _mm_storel_epi64(
      reinterpret_cast<__m128i*>(p),
      _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#elif defined(__SSSE3__)
  store(p, _mm_cvtsi128_si32(_mm_shuffle_epi8((__m128i)x, _mm_set1_epi32(0x0c080400))));
#else
  for (int k = 0; k < LANES; ++k) p[k] = uint8_t(x[k]);
#endif
}

// signed; what does not fit is cut to -128 .. 127
FLCORE_INLINE void store_i8(int8_t* p, const vi32& x) {
#if defined(__AVX512F__)
  store(p, _mm512_maskz_cvtsepi32_epi8(__mmask16(0xffff), (__m512i)x));
#elif defined(__AVX2__)
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#elif defined(__x86_64__)
  const __m128i words = _mm_packs_epi32((__m128i)x, (__m128i)x);
  store(p, _mm_cvtsi128_si32(_mm_packs_epi16(words, words)));
#else
  for (int k = 0; k < LANES; ++k) p[k] = int8_t(x[k] < -128 ? -128 : x[k] > 127 ? 127 : x[k]);
#endif
}

// ---- float32 ------------------------------------------------------------------------------------

// rounded to nearest even
FLCORE_INLINE vf32 to_float(const vi32& x) {
#if defined(__AVX512F__)
  return (vf32)_mm512_maskz_cvtepi32_ps(__mmask16(0xffff), (__m512i)x);
#elif defined(__AVX2__)
  return (vf32)_mm256_cvtepi32_ps((__m256i)x);
#elif defined(__x86_64__)
  return (vf32)_mm_cvtepi32_ps((__m128i)x);
#else
  return __builtin_convertvector(x, vf32);
#endif
}

// rounded to nearest even; |x| < 2^31
FLCORE_INLINE vi32 to_nearest(const vf32& x) {
#if defined(__AVX512F__)
  return (vi32)_mm512_maskz_cvtps_epi32(__mmask16(0xffff), (__m512)x);
#elif defined(__AVX2__)
  return (vi32)_mm256_cvtps_epi32((__m256)x);
#elif defined(__x86_64__)
  return (vi32)_mm_cvtps_epi32((__m128)x);
#else
  vi32 q;
  for (int k = 0; k < LANES; ++k) q[k] = int32_t(__builtin_rintf(x[k]));
  return q;
#endif
}

// table[x % 16]
FLCORE_INLINE vf32 look_up(const float* table, const vi32& x) {
#if defined(__AVX512F__)
  return (vf32)_mm512_maskz_permutexvar_ps(__mmask16(0xffff), (__m512i)x, load<__m512>(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(load<__m256>(table), (__m256i)x);
  const __m256 high = _mm256_permutevar8x32_ps(load<__m256>(table + 8), (__m256i)x);
  return (vf32)_mm256_blendv_ps(low, high, (__m256)(x << 28));
#else
  const vu32 i = (vu32)x & 15u;
  vf32 y;
  for (int k = 0; k < LANES; ++k) y[k] = load<float>(table + i[k]);
  return y;
#endif
}

// table[p[k] % 16]
FLCORE_INLINE vf32 look_up(const float* table, const uint8_t* p) {
#if defined(__AVX2__)
  return look_up(table, load_u8(p));
#else  // no detour through a vector
  vf32 y;
  for (int k = 0; k < LANES; ++k) y[k] = load<float>(table + (p[k] & 15));
  return y;
#endif
}

// ---- the larger of two --------------------------------------------------------------------------

FLCORE_INLINE vi32 lower(const vi32& x, const vi32& y) { return x < y ? x : y; }
FLCORE_INLINE vi32 higher(const vi32& x, const vi32& y) { return x > y ? x : y; }

// the largest of LANES values
FLCORE_INLINE int32_t highest(const vi32& x) {
#if defined(__AVX512F__)
  const __m256i low = _mm512_maskz_extracti64x4_epi64(__mmask8(0xff), (__m512i)x, 0);
  const __m256i up = _mm512_maskz_extracti64x4_epi64(__mmask8(0xff), (__m512i)x, 1);
  const __m256i y = _mm256_max_epi32(low, up);
#elif defined(__AVX2__)
  const __m256i y = (__m256i)x;
#endif
#if defined(__AVX2__)
  __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
#elif defined(__SSE4_1__)
  __m128i z = (__m128i)x;
#endif
#if defined(__SSE4_1__)
  z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
#else
  int32_t top = x[0];
  for (int k = 1; k < LANES; ++k) top = x[k] > top ? x[k] : top;
  return top;
#endif
}

}  // namespace FLCORE_ISA
}  // namespace flcore
