// Reading the codes of codes_linear.h: part of a bucket as float32, or added to an accumulator as
// acc + w D, product and sum rounded, without D ever being stored.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/codes.h"
#include "cpu/codes_pack.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// LANES codes, one a byte, as floats
FLCORE_INLINE vf32 code_values(const uint8_t* codes, const vf32&) {
#if defined(__AVX512F__)
  return (vf32)_mm512_maskz_cvtepi32_ps(
      __mmask16(0xffff), _mm512_maskz_cvtepu8_epi32(__mmask16(0xffff), load<__m128i>(codes)));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return (vf32)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#elif defined(__SSE4_1__)
  const __m128i bytes = _mm_cvtsi32_si128(load<int32_t>(codes));
  return (vf32)_mm_cvtepi32_ps(_mm_cvtepu8_epi32(bytes));
#else
  vf32 x;
  for (int k = 0; k < LANES; ++k) x[k] = float(codes[k]);
  return x;
#endif
}
FLCORE_INLINE float code_values(const uint8_t* codes, float) { return float(*codes); }

struct SymmetricPoint {  // unit (code - middle)
  float unit, middle;
  template <class V>
  FLCORE_MEMBER V at(const V& code) const {
    return unit * (code - middle);
  }
};
struct AffinePoint {  // lo + unit code
  float lo, unit;
  template <class V>
  FLCORE_MEMBER V at(const V& code) const {
    return lo + unit * code;
  }
};

template <bool ADD, class Point>
static void walk_codes(const uint8_t* codes, int64_t n, const Point& point, float weight,
                       float* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vf32 d = point.at(code_values(codes + i, vf32{}));
    store(out + i, ADD ? load<vf32>(out + i) + weight * d : d);
  }
  for (; i < n; ++i) {
    const float d = point.at(code_values(codes + i, 0.0f));
    store(out + i, ADD ? load<float>(out + i) + weight * d : d);
  }
}

#if defined(__AVX512F__)
// Codes of 4 bits: what each stands for (ADD: times the weight) fits one register, and looking it
// up takes one instruction.
template <bool ADD, class Point>
static void walk_nibbles(const uint8_t* codes, int64_t begin, int64_t n, const Point& point,
                         float weight, float* out) {
  float table[16];
  for (int code = 0; code < 16; ++code) {
    const float d = point.at(float(code));
    table[code] = ADD ? weight * d : d;
  }
  int64_t i = 0;
  const auto one = [&] {
    const float d = table[(codes[(begin + i) / 2] >> ((begin + i) % 2 * 4)) & 15];
    store(out + i, ADD ? load<float>(out + i) + d : d);
    ++i;
  };
  if (n > 0 && begin % 2) one();
  vi32 first, second;  // even and odd codes take turns
  for (int k = 0; k < LANES; ++k) {
    first[k] = k / 2 + k % 2 * LANES;
    second[k] = first[k] + LANES / 2;
  }
  const __m512 values = (__m512)load<vf32>(table);
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const __m128i bytes = load<__m128i>(codes + (begin + i) / 2);
    const __m512i even = _mm512_maskz_cvtepu8_epi32(__mmask16(0xffff), bytes);
    const __m512i odd = (__m512i)((vu32)even >> 4);
    const vf32 a = (vf32)_mm512_maskz_permutexvar_ps(__mmask16(0xffff), even, values);
    const vf32 b = (vf32)_mm512_maskz_permutexvar_ps(__mmask16(0xffff), odd, values);
    const vf32 low = __builtin_shuffle(a, b, first), high = __builtin_shuffle(a, b, second);
    store(out + i, ADD ? load<vf32>(out + i) + low : low);
    store(out + i + LANES, ADD ? load<vf32>(out + i + LANES) + high : high);
  }
  while (i < n) one();
}
#endif

// The top bit of lane k is bit k of a byte (two bytes for 16 lanes).
FLCORE_INLINE vi32 lane_signs(const uint8_t* bits, int at) {
#if defined(__AVX512F__)
  (void)at;
  return (vi32)_mm512_maskz_set1_epi32(__mmask16(load<uint16_t>(bits)), int32_t(0x80000000u));
#else
  const int32_t byte = *bits >> at;
  vi32 one;
  for (int k = 0; k < LANES; ++k) one[k] = 1 << k;
  return ((vi32{} + byte) & one) == 0 ? vi32{} : vi32{} + int32_t(0x80000000u);
#endif
}

// bits: of the bucket; the first wanted coordinate is `begin`. ADD: scale is w a, else a
template <bool ADD>
static void walk_signs(const uint8_t* bits, int64_t begin, int64_t n, float scale, float* out) {
  const vi32 size = vi32{} + int32_t(bits_of(scale));
  int64_t i = 0;
  const auto one = [&] {
    const float d = (bits[(begin + i) / 8] >> ((begin + i) % 8)) & 1 ? -scale : scale;
    store(out + i, ADD ? load<float>(out + i) + d : d);
    ++i;
  };
  while (i < n && (begin + i) % 8) one();
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; k += LANES) {
      const vf32 d = (vf32)(size ^ lane_signs(bits + (begin + i + k) / 8, k % 8));
      store(out + i + k, ADD ? load<vf32>(out + i + k) + d : d);
    }
  while (i < n) one();
}

// n <= BLOCK_MAX; the segment may begin anywhere. bytes: [BLOCK_MAX + 64]
template <bool ADD>
static void walk_linear(const PacketView& p, const Segment& s, float weight, float* out,
                        uint8_t* bytes) {
  const uint8_t *scales = s.scales(p), *codes = s.codes(p);
  const float first = load_scale(scales, 0, p.value_dtype);
  if (p.codec == CODEC_SIGN) {
    // the product of w and -a is that of w and a with the other sign
    walk_signs<ADD>(codes, s.begin, s.n, ADD ? weight * first : first, out);
    return;
  }
#if defined(__AVX512F__)
  if (p.bits == 4 && p.codec == CODEC_UNIFORM)
    return walk_nibbles<ADD>(codes, s.begin, s.n, SymmetricPoint{first, 7.0f}, weight, out);
  if (p.bits == 4 && p.codec == CODEC_AFFINE) {
    const AffinePoint point{first, load_scale(scales, 1, p.value_dtype)};
    return walk_nibbles<ADD>(codes, s.begin, s.n, point, weight, out);
  }
#endif
  const uint8_t* each = codes + s.begin;
  if (p.codec == CODEC_TERNARY && p.form == 1) {
    unpack_trits(codes, s.begin, s.n, bytes);
    each = bytes + s.begin % 5;
  } else if (p.bits != 8) {
    const int64_t skip = s.begin % 8;
    unpack_codes(p.bits, codes + s.begin / 8 * p.bits, s.n + skip, bytes);
    each = bytes + skip;
  }
  if (p.codec == CODEC_AFFINE) {
    const float unit = load_scale(scales, 1, p.value_dtype);
    walk_codes<ADD>(each, s.n, AffinePoint{first, unit}, weight, out);
  } else {
    const float middle = p.codec == CODEC_TERNARY ? 1.0f : float((1 << (p.bits - 1)) - 1);
    walk_codes<ADD>(each, s.n, SymmetricPoint{first, middle}, weight, out);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
