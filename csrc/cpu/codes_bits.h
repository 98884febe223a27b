// Vectors of int32 to and from bytes and 16-bit words, and codes of 9 bits to and from the wire.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// ---- LANES values of 8 or 16 bits ---------------------------------------------------------------

FLCORE_INLINE vi32 load_u8(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi32)_mm512_maskz_cvtepu8_epi32(__mmask16(0xffff), load<__m128i>(p));
#elif defined(__AVX2__)
  return (vi32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  vi32 x;
  for (int k = 0; k < LANES; ++k) x[k] = p[k];
  return x;
#endif
}

FLCORE_INLINE vi32 load_u16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vi32)_mm512_maskz_cvtepu16_epi32(__mmask16(0xffff), load<__m256i>(p));
#elif defined(__AVX2__)
  return (vi32)_mm256_cvtepu16_epi32(load<__m128i>(p));
#else
  return (vi32)__builtin_convertvector(load<vu16h>(p), vu32);
#endif
}

// the low 8 bits of each value; what is above them is lost
FLCORE_INLINE void store_u8(uint8_t* p, const vi32& x) {
#if defined(__AVX512F__)
  store(p, _mm512_maskz_cvtepi32_epi8(__mmask16(0xffff), (__m512i)x));
#elif defined(__AVX2__)
  const __m256i low = (__m256i)(x & 0xff);
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  for (int k = 0; k < LANES; ++k) p[k] = uint8_t(x[k]);
#endif
}

// values below 2^16
FLCORE_INLINE void store_u16(uint16_t* p, const vi32& x) {
#if defined(__AVX512F__)
  store(p, _mm512_maskz_cvtepi32_epi16(__mmask16(0xffff), (__m512i)x));
#elif defined(__AVX2__)
  const __m256i v = (__m256i)x;
  store(p, _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  for (int k = 0; k < LANES; ++k) store(p + k, uint16_t(x[k]));
#endif
}

FLCORE_INLINE vi32 lower(const vi32& x, const vi32& y) { return x < y ? x : y; }
FLCORE_INLINE vi32 higher(const vi32& x, const vi32& y) { return x > y ? x : y; }

// the largest of LANES values
FLCORE_INLINE int32_t highest(const vi32& x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256i lo = _mm512_maskz_extracti64x4_epi64(__mmask8(0xff), (__m512i)x, 0);
  const __m256i hi = _mm512_maskz_extracti64x4_epi64(__mmask8(0xff), (__m512i)x, 1);
  const __m256i y = _mm256_max_epi32(lo, hi);
#else
  const __m256i y = (__m256i)x;
#endif
  __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
  z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1));
  return _mm_cvtsi128_si32(z);
#else
  int32_t top = x[0];
  for (int k = 1; k < LANES; ++k) top = x[k] > top ? x[k] : top;
  return top;
#endif
}

// A few bytes, where a vector ends: a loop that does not become a call.
FLCORE_INLINE void copy_some(void* to, const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i)
    static_cast<uint8_t*>(to)[i] = static_cast<const uint8_t*>(from)[i];
}

// Random bits from the i-th on; there may be none.
FLCORE_INLINE const uint16_t* ahead(const uint16_t* random, int64_t i) {
  return random ? random + i : random;
}

// ---- 9 bits: code j of a bucket occupies the bits [9 j, 9 j + 9), the rest is zero -------------

FLCORE_INLINE uint64_t join_nine(uint64_t v) {  // four codes, one a word, to 36 bits
  v = (v & 0x000001ff000001ff) | ((v & 0x01ff000001ff0000) >> 7);
  return (v & 0x3ffff) | (v >> 32 << 18);
}
FLCORE_INLINE uint64_t split_nine(uint64_t v) {
  v = (v & 0x3ffff) | ((v >> 18 & 0x3ffff) << 32);
  return (v & 0x000001ff000001ff) | ((v & 0x0003fe000003fe00) << 7);
}

FLCORE_INLINE void pack_eight_nines(const uint16_t* codes, uint8_t* out) {
  const uint64_t low = join_nine(load<uint64_t>(codes));
  const uint64_t high = join_nine(load<uint64_t>(codes + 4));
  store(out, low | high << 36);
  out[8] = uint8_t(high >> 28);
}
FLCORE_INLINE void unpack_eight_nines(const uint8_t* in, uint16_t* codes) {
  const uint64_t v = load<uint64_t>(in);
  store(codes, split_nine(v));
  store(codes + 4, split_nine(v >> 36 | uint64_t(in[8]) << 28));
}

// n codes, one a word and below 2^9, into ceil(9 n / 8) bytes
static void pack_nines(const uint16_t* codes, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8, out += 9) pack_eight_nines(codes + i, out);
  if (i == n) return;
  uint16_t last[8] = {};
  uint8_t packed[9];
  copy_some(last, codes + i, 2 * (n - i));
  pack_eight_nines(last, packed);
  copy_some(out, packed, (9 * (n - i) + 7) / 8);
}

static void unpack_nines(const uint8_t* in, int64_t n, uint16_t* codes) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8, in += 9) unpack_eight_nines(in, codes + i);
  if (i == n) return;
  uint16_t last[8];
  uint8_t packed[9] = {};
  copy_some(packed, in, (9 * (n - i) + 7) / 8);
  unpack_eight_nines(packed, last);
  copy_some(codes + i, last, 2 * (n - i));
}

}  // namespace FLCORE_ISA
}  // namespace flcore
