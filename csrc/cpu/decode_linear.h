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

// LANES codes, one a byte
FLCORE_INLINE vi32 code_numbers(const uint8_t* codes) {
#if defined(__AVX512F__)
  return (vi32)_mm512_maskz_cvtepu8_epi32(__mmask16(0xffff), load<__m128i>(codes));
#elif defined(__AVX2__)
  return (vi32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
#elif defined(__SSE4_1__)
  return (vi32)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(load<int32_t>(codes)));
#else
  vi32 x;
  for (int k = 0; k < LANES; ++k) x[k] = codes[k];
  return x;
#endif
}

FLCORE_INLINE vf32 code_values(const uint8_t* codes, const vf32&) {
  return __builtin_convertvector(code_numbers(codes), vf32);
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

// Whether codes of 4 bits are looked up: what each stands for fits one register, and finding it
// takes one instruction.
static bool takes_nibbles(int codec) {
#if defined(__AVX512F__)
  return codec == CODEC_UNIFORM || codec == CODEC_AFFINE;
#else
  (void)codec;
  return false;
#endif
}

#if defined(__AVX512F__)
// What the codes of 4 bits stand for, times a factor.
template <class Point>
static void fill_table(const Point& point, float factor, float* table) {
  for (int code = 0; code < 16; ++code) table[code] = factor * point.at(float(code));
}

struct NibbleOrder {
  vi32 first, second;  // of even and odd coordinates as they take turns
  vi32 even, odd;      // and back

  FLCORE_MEMBER NibbleOrder() {
    for (int k = 0; k < LANES; ++k) {
      first[k] = k / 2 + k % 2 * LANES;
      second[k] = first[k] + LANES / 2;
      even[k] = 2 * k;
      odd[k] = 2 * k + 1;
    }
  }
};

// Entry of a table by the low four bits of each lane
FLCORE_INLINE vf32 look_up(const vf32& table, const vi32& code) {
  return (vf32)_mm512_maskz_permutexvar_ps(__mmask16(0xffff), (__m512i)code, (__m512)table);
}

// Lane k: lane order[k] of both, those of b counted from LANES on
FLCORE_INLINE vf32 shuffle_two(const vf32& a, const vf32& b, const vi32& order) {
  return (vf32)_mm512_maskz_permutex2var_ps(__mmask16(0xffff), (__m512)a, (__m512i)order,
                                            (__m512)b);
}

// Codes of 4 bits. table: what each stands for, ADD: times the weight
template <bool ADD, class Point>
static void walk_nibbles(const uint8_t* codes, int64_t begin, int64_t n, const Point& point,
                         float weight, float* out) {
  float table[16];
  fill_table(point, ADD ? weight : 1.0f, table);
  int64_t i = 0;
  const auto one = [&] {
    const float d = table[(codes[(begin + i) / 2] >> ((begin + i) % 2 * 4)) & 15];
    store(out + i, ADD ? load<float>(out + i) + d : d);
    ++i;
  };
  if (n > 0 && begin % 2) one();
  const NibbleOrder order;
  const vf32 values = load<vf32>(table);
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const vi32 code = code_numbers(codes + (begin + i) / 2);
    const vf32 even = look_up(values, code), odd = look_up(values, code >> 4);
    const vf32 low = shuffle_two(even, odd, order.first);
    const vf32 high = shuffle_two(even, odd, order.second);
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

constexpr int64_t CODE_BYTES = BLOCK_MAX + 64;  // scratch for the codes of a segment

// The codes of a segment one a byte: where they are, or unpacked into bytes [CODE_BYTES]
static const uint8_t* whole_codes(const PacketView& p, const Segment& s, uint8_t* bytes) {
  const uint8_t* codes = s.codes(p);
  if (p.codec == CODEC_TERNARY && p.form == 1) {
    unpack_trits(codes, s.begin, s.n, bytes);
    return bytes + s.begin % 5;
  }
  if (p.bits == 8) return codes + s.begin;
  const int64_t skip = s.begin % 8;
  unpack_codes(p.bits, codes + s.begin / 8 * p.bits, s.n + skip, bytes);
  return bytes + skip;
}

// The code that stands for 0, unless the codec is affine
static int middle_code(const PacketView& p) {
  return p.codec == CODEC_TERNARY ? 1 : (1 << (p.bits - 1)) - 1;
}

// n <= BLOCK_MAX; the segment may begin anywhere. bytes: [CODE_BYTES]
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
  if (p.bits == 4 && takes_nibbles(p.codec)) {
#if defined(__AVX512F__)
    if (p.codec == CODEC_UNIFORM)
      return walk_nibbles<ADD>(codes, s.begin, s.n, SymmetricPoint{first, 7.0f}, weight, out);
    const AffinePoint point{first, load_scale(scales, 1, p.value_dtype)};
    return walk_nibbles<ADD>(codes, s.begin, s.n, point, weight, out);
#endif
  }
  const uint8_t* each = whole_codes(p, s, bytes);
  if (p.codec == CODEC_AFFINE) {
    const float unit = load_scale(scales, 1, p.value_dtype);
    walk_codes<ADD>(each, s.n, AffinePoint{first, unit}, weight, out);
  } else {
    walk_codes<ADD>(each, s.n, SymmetricPoint{first, float(middle_code(p))}, weight, out);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
