// Codes that are numbers of 4 to 8 bits with a scale: FP8, MX blocks, the codebook NF4.
//
//   |u| / scale = y;  e = max(floor(log2 y), emin);  k = y 2^(M - e), rounded: to nearest even, or
//   floor(k + r) with r = (half + 1/2) 2^-16;  code = k + ((e - emin) << M), at most the largest.
// A carry of k into the next power of two is right by itself, and at e = emin the same formula
// counts subnormals. Products with powers of two are exact, so that no level changes a bit.
// Every code decodes to a finite number: those that mean NaN or infinity elsewhere are the largest.
//
// Scales: float32, the least power of two that fits (for NF4 max|u|), or a byte X + 127 with
// X = floor(log2 max|u|) - emax. Sources: OCP Microscaling Formats 1.0; Micikevicius et al., "FP8
// Formats for Deep Learning", arXiv 2209.05433; Dettmers et al., "QLoRA", arXiv 2305.14314 (NF4).
#pragma once

#include <cstdint>

#include "cpu/codes.h"
#include "cpu/codes_bits.h"
#include "cpu/codes_pack.h"
#include "cpu/int_lanes.h"

namespace flcore {
namespace FLCORE_ISA {

struct MiniFormat {
  int bits, mantissa, emin, emax, top;  // top: code of the largest magnitude
  float largest;
};

enum MiniForm : int { E4M3 = 1, E5M2, E3M2, E2M3, E2M1, INT8, NF4, MINI_FORMS };

constexpr MiniFormat MINI[MINI_FORMS] = {
    {},
    {8, 3, -6, 8, 0x7e, 448.0f},
    {8, 2, -14, 15, 0x7b, 57344.0f},
    {6, 2, -2, 4, 0x1f, 28.0f},
    {6, 3, 0, 2, 0x1f, 7.5f},
    {4, 1, 0, 2, 0x07, 6.0f},
    {8, 6, 0, 0, 0x7f, 127.0f / 64},  // two's complement, 64ths
    {4, 0, 0, 0, 0x0f, 1.0f},
};

constexpr float NF4_VALUES[16] = {
    -1.0f,                -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f,  0.7229568362236023f,  1.0f};

constexpr int32_t SCALE_TOP = 0x7f7ffffc;  // bits of the largest float32 up to WIRE_LARGEST

constexpr uint32_t exponent_bits(int exponent) { return uint32_t(exponent + 127) << 23; }

// 2^(byte - 127); byte <= 254
FLCORE_INLINE float e8m0(int byte) { return float_of(byte ? uint32_t(byte) << 23 : 0x400000u); }

// ---- LANES values -------------------------------------------------------------------------------

// Codes of u, d = what they decode to. inverse = 1 / scale, both powers of two, or 0.
template <int FORM, bool RANDOM>
FLCORE_INLINE vi32 mini_cast(const vf32& u, float inverse, float scale, const uint16_t* random,
                             int64_t i, vf32& d) {
  constexpr MiniFormat F = MINI[FORM];
  constexpr int DROP = 23 - F.mantissa;
  const vi32 bits = (vi32)u;
  const vf32 y = (vf32)(bits & 0x7fffffff) * inverse;
  vi32 e = vi32{} + int32_t(exponent_bits(F.emin));  // 2^e as a float
  if constexpr (FORM != INT8) e = higher((vi32)y, e) & 0x7f800000;
  const vf32 z = y * (vf32)((uint32_t(254 + F.mantissa) << 23) - (vu32)e);  // 2^(M - exponent)
  vi32 k;
  if constexpr (RANDOM)
    k = __builtin_convertvector(z + random_fraction(random, i, z), vi32);
  else
    k = (vi32)(z + 0x1p23f) - int32_t(exponent_bits(23));
  const vi32 magnitude = lower(k + ((e - int32_t(exponent_bits(F.emin))) >> DROP), vi32{} + F.top);
  if constexpr (FORM == INT8) {
    const vi32 minus = bits >> 31, code = (magnitude ^ minus) - minus;
    d = __builtin_convertvector(code, vf32) * 0x1p-6f * scale;
    return code & 0xff;
  } else {
    const vf32 value = __builtin_convertvector(k, vf32) * (vf32)(e - (F.mantissa << 23));
    const vf32 most = vf32{} + F.largest;
    d = (vf32)((vi32)((value < most ? value : most) * scale) | (bits & INT32_MIN));
    return magnitude | (vi32)(((vu32)bits >> 31) << (F.bits - 1));
  }
}

// The numbers that codes stand for, before the scale.
template <int FORM>
FLCORE_INLINE vf32 mini_values(const vi32& code) {
  constexpr MiniFormat F = MINI[FORM];
  if constexpr (FORM == NF4) {
    return look_up(NF4_VALUES, code);
  } else if constexpr (FORM == INT8) {
    const vi32 number = higher((code << 24) >> 24, vi32{} - 127);
    return __builtin_convertvector(number, vf32) * 0x1p-6f;
  } else {
    const vi32 low = code & ((1 << (F.bits - 1)) - 1);
    const vi32 magnitude = FORM == E4M3 || FORM == E5M2 ? lower(low, vi32{} + F.top) : low;
    // a subnormal is read as 1.m 2^emin, from which 2^emin is taken away
    const vi32 small = magnitude < (1 << F.mantissa);
    const vi32 x = (magnitude << (23 - F.mantissa)) + int32_t(exponent_bits(F.emin - 1)) +
                   (small & (1 << 23));
    const vf32 value = (vf32)x - (vf32)(small & int32_t(exponent_bits(F.emin)));
    return (vf32)((vi32)value | (code >> (F.bits - 1)) << 31);
  }
}

FLCORE_INLINE vi32 nf4_cast(const vf32& u, float divisor, float scale, vf32& d) {
  const vf32 y = u / divisor;
  vi32 code = {};
  unroll<15>([&](auto at) FLCORE_LAMBDA {
    constexpr int K = decltype(at)::value;
    constexpr float middle = (NF4_VALUES[K] + NF4_VALUES[K + 1]) / 2;
    code -= (vi32)(y > middle);
  });
  d = scale * mini_values<NF4>(code);
  return code;
}

// ---- scales -------------------------------------------------------------------------------------

static int32_t magnitude_top(const float* u, int64_t n) {
  vi32 tops = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) tops = higher(tops, load<vi32>(u + i) & 0x7fffffff);
  int32_t top = i ? highest(tops) : 0;
  for (; i < n; ++i) {
    const int32_t key = int32_t(bits_of(load<float>(u + i)) & 0x7fffffff);
    top = key > top ? key : top;
  }
  return top;
}

// Scale of a bucket whose largest magnitude has the bits `top`; written to the packet.
template <int FORM>
FLCORE_INLINE void mini_scale(int32_t top, int dtype, uint8_t* out, float& scale, float& inverse) {
  constexpr MiniFormat F = MINI[FORM];
  if (FORM == NF4) {
    scale = float_of(uint32_t(top < SCALE_TOP ? top : SCALE_TOP));
    inverse = scale != 0 ? scale : 1.0f;  // the divisor
    store(out, scale);
  } else if (dtype == WIRE_E8M0) {
    const int x = (top >> 23) - F.emax, byte = x > 0 ? x : 0;
    scale = e8m0(byte);
    inverse = e8m0(254 - byte);
    *out = uint8_t(byte);
  } else {
    // one more where the mantissa of max|u| is above that of the largest number
    constexpr int32_t fraction = (F.top & ((1 << F.mantissa) - 1)) << (23 - F.mantissa);
    int power = ((top + (0x7fffff - fraction)) >> 23) - 127 - F.emax;
    power = power < -126 ? -126 : power > 127 - F.emax ? 127 - F.emax : power;
    scale = top ? float_of(exponent_bits(power)) : 0.0f;
    inverse = top ? float_of(power == 127 ? 0x400000u : exponent_bits(-power)) : 0.0f;
    store(out, scale);
  }
}

// ---- buckets ------------------------------------------------------------------------------------

// One bucket, whose scale is known: bytes[i] = its code, d.
template <int FORM, bool RANDOM>
FLCORE_INLINE void mini_codes(const float* u, int64_t n, float scale, float inverse,
                              const uint16_t* random, uint8_t* bytes, float* d) {
  const auto cast = [&](const vf32& x, const uint16_t* bits, int64_t i, vf32& y) FLCORE_LAMBDA {
    if constexpr (FORM == NF4)
      return nf4_cast(x, inverse, scale, y);
    else
      return mini_cast<FORM, RANDOM>(x, inverse, scale, bits, i, y);
  };
  int64_t i = 0;
  vf32 y;
  for (; i + LANES <= n; i += LANES) {
    store_u8(bytes + i, cast(load<vf32>(u + i), random, i, y));
    store(d + i, y);
  }
  if (i == n) return;
  vf32 x = {};
  uint16_t bits[LANES] = {};
  uint8_t last[LANES];
  copy_some(&x, u + i, 4 * (n - i));
  if (RANDOM) copy_some(bits, random + i, 2 * (n - i));
  store_u8(last, cast(x, bits, 0, y));
  copy_some(bytes + i, last, n - i);
  copy_some(d + i, &y, 4 * (n - i));
}

// One bucket, or several one after another.
template <int FORM, bool RANDOM>
static void quantize_mini(const BucketJob& job) {
  constexpr int B = MINI[FORM].bits;
  const CodecArgs& c = job.c;
  uint8_t *scales = job.scales, *codes = job.codes;
  for (int64_t at = 0; at < job.n; at += c.bucket) {
    const int64_t n = c.bucket < job.n - at ? c.bucket : job.n - at;
    float scale, inverse;
    mini_scale<FORM>(magnitude_top(job.u + at, n), c.scale_dtype, scales, scale, inverse);
    uint8_t* bytes = B == 8 ? codes : reinterpret_cast<uint8_t*>(job.work);
    mini_codes<FORM, RANDOM>(job.u + at, n, scale, inverse, ahead(job.random, at), bytes,
                             job.d + at);
    if constexpr (B < 8) pack_codes<B>(bytes, n, codes);
    scales += c.scale_stride;
    codes += c.code_stride;
  }
}

template <int FORM>
static void dequantize_mini(const PacketView& p, const Segment& s, float* out, float* work) {
  constexpr int B = MINI[FORM].bits;
  for (int64_t bucket = s.bucket, at = s.begin, done = 0; done < s.n; ++bucket, at = 0) {
    const int64_t n = s.length - at < s.n - done ? s.length - at : s.n - done;
    const uint8_t* scales = p.scales + bucket * p.scale_stride;
    const uint8_t* codes = p.codes + bucket * p.code_stride + at * B / 8;
    const float scale = p.value_dtype == WIRE_E8M0 ? e8m0(*scales) : load<float>(scales);
    if constexpr (B < 8) {
      unpack_codes<B>(codes, n, reinterpret_cast<uint8_t*>(work));
      codes = reinterpret_cast<uint8_t*>(work);
    }
    float* to = out + done;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, mini_values<FORM>(load_u8(codes + i)) * scale);
    if (i < n) {
      uint8_t last[LANES] = {};
      copy_some(last, codes + i, n - i);
      const vf32 values = mini_values<FORM>(load_u8(last)) * scale;
      copy_some(to + i, &values, 4 * (n - i));
    }
    done += n;
  }
}

template <int FORM>
static void quantize_mini(const BucketJob& job) {
  if (job.c.stochastic)
    quantize_mini<FORM, true>(job);
  else
    quantize_mini<FORM, false>(job);
}

static inline void quantize_minifloat(const BucketJob& job) {
  switch (job.c.form) {
    case E4M3: return quantize_mini<E4M3>(job);
    case E5M2: return quantize_mini<E5M2>(job);
    case E3M2: return quantize_mini<E3M2>(job);
    case E2M3: return quantize_mini<E2M3>(job);
    case E2M1: return quantize_mini<E2M1>(job);
    case INT8: return quantize_mini<INT8>(job);
    default: return quantize_mini<NF4, false>(job);
  }
}

// One bucket or part of it, or whole buckets one after another.
static inline void dequantize_minifloat(const PacketView& p, const Segment& s, float* out,
                                 float* work) {
  switch (p.form) {
    case E4M3: return dequantize_mini<E4M3>(p, s, out, work);
    case E5M2: return dequantize_mini<E5M2>(p, s, out, work);
    case E3M2: return dequantize_mini<E3M2>(p, s, out, work);
    case E2M3: return dequantize_mini<E2M3>(p, s, out, work);
    case E2M1: return dequantize_mini<E2M1>(p, s, out, work);
    case INT8: return dequantize_mini<INT8>(p, s, out, work);
    default: return dequantize_mini<NF4>(p, s, out, work);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
