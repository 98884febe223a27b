// Codes without a scale: values cast to a storage type, and signed powers of two (natural
// compression, Horvath et al., arXiv 1905.10988). Codes with one: codes_minifloat.h.
//
// Natural: |u| = m 2^e becomes 2^(e+1) with probability m - 1, else 2^e. A random number is added
// below the exponent field of the float32, and the carry decides. Form 0 is sign and exponent
// field, 9 bits, at most 2^127; form 1 is sign and 7 bits, 0 or a power from 2^-108 to 2^18: the value is
// first multiplied by 2^-18, so that 2^-108 is the least normal float32 and what is below it
// rounds to it or to 0 by the same addition.
#pragma once

#include <cstdint>

#include "cpu/codes.h"
#include "cpu/codes_bits.h"
#include "cpu/codes_minifloat.h"

namespace flcore {
namespace FLCORE_ISA {

// ---- storage types ------------------------------------------------------------------------------

// To the nearest number, ties to even, or stochastically; at most the largest finite one. The low
// 16 bits of each value.
template <int D, bool RANDOM>
FLCORE_INLINE vi32 dense_bits(const vf32& u, const vi32& half) {
  const vi32 bits = (vi32)u, body = bits & 0x7fffffff;
  const vi32 sign = (vi32)((vu32)bits >> 16) & 0x8000;
  if constexpr (D == BF16) {
    const vi32 rounded = body + (RANDOM ? half : ((body >> 16) & 1) + 0x7fff);
    // as unsigned numbers: a sum may pass 2^31
    return sign | lower((vi32)((vu32)rounded >> 16), vi32{} + 0x7f7f);
  } else if constexpr (RANDOM) {
    const vi32 up = half >> 3;  // 13 bits do not fit
    const vf32 steps = (vf32)body * 0x1p24f + __builtin_convertvector(up, vf32) * 0x1p-13f;
    const vf32 most = vf32{} + 2048.0f;
    const vi32 small = __builtin_convertvector(steps < most ? steps : most, vi32);
    const vi32 normal = (body + up - 0x38000000) >> 13;
    return sign | lower(body < 0x38800000 ? small : normal, vi32{} + 0x7bff);
  } else {
    // subnormal: the float adder rounds at 2^-24
    const vi32 small = (vi32)((vf32)body + 0.5f) - 0x3f000000;
    const vi32 normal = (body - 0x38000000 + 0xfff + ((body >> 13) & 1)) >> 13;
    return sign | lower(body < 0x38800000 ? small : normal, vi32{} + 0x7bff);
  }
}

// LANES values as words and decoded
template <int D, bool RANDOM>
FLCORE_INLINE void dense_lanes(const vf32& u, const uint16_t* random, uint16_t* words, vf32& d) {
  vi32 half = {};
  if constexpr (RANDOM) half = load_u16(random);
  store_u16(words, dense_bits<D, RANDOM>(u, half));
  d = load_f32<D>(words, 0);
}

template <int D, bool RANDOM>
static void quantize_16(const BucketJob& job) {
  const int64_t n = job.n;
  uint16_t words[LANES], random[LANES] = {};
  vf32 u = {}, d;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    dense_lanes<D, RANDOM>(load<vf32>(job.u + i), ahead(job.random, i), words, d);
    __builtin_memcpy(job.codes + 2 * i, words, sizeof words);
    store(job.d + i, d);
  }
  if (i == n) return;
  copy_some(&u, job.u + i, 4 * (n - i));
  if (RANDOM) copy_some(random, job.random + i, 2 * (n - i));
  dense_lanes<D, RANDOM>(u, random, words, d);
  copy_some(job.codes + 2 * i, words, 2 * (n - i));
  copy_some(job.d + i, &d, 4 * (n - i));
}

static inline void quantize_dense(const BucketJob& job) {
  switch (job.c.scale_dtype) {
    case F16: return job.c.stochastic ? quantize_16<F16, true>(job) : quantize_16<F16, false>(job);
    case BF16:
      return job.c.stochastic ? quantize_16<BF16, true>(job) : quantize_16<BF16, false>(job);
    default:
      __builtin_memcpy(job.codes, job.u, size_t(4 * job.n));
      __builtin_memcpy(job.d, job.u, size_t(4 * job.n));
  }
}

template <int D>
static void dequantize_16(const uint8_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, load_f32<D>(in, i));
  for (; i < n; ++i) store(out + i, load1<D>(in, i));
}

// Codes lie side by side whatever the bucket, so a segment may hold several.
static inline void dequantize_dense(const PacketView& p, const Segment& s, float* out, float*) {
  const int64_t bytes = p.value_dtype == F32 ? 4 : 2;
  const uint8_t* in = p.codes + s.bucket * p.code_stride + s.begin * bytes;
  switch (p.value_dtype) {
    case F16: return dequantize_16<F16>(in, s.n, out);
    case BF16: return dequantize_16<BF16>(in, s.n, out);
    default: __builtin_memcpy(out, in, size_t(4 * s.n));
  }
}

// ---- powers of two ------------------------------------------------------------------------------

constexpr int NATURAL_SHIFT = 18;  // form 1: code c is 2^(c - 127 + 18)

template <int FORM>
FLCORE_INLINE vi32 natural_cast(const vf32& u, const vi32& noise) {
  constexpr int TOP = FORM == 0 ? 254 : 127, SIGN = FORM == 0 ? 8 : 7;
  vi32 body = (vi32)u & 0x7fffffff;
  if constexpr (FORM == 1) body = (vi32)((vf32)body * 0x1p-18f);
  // the largest exponent is full: sums do not pass 2^31
  const vi32 exponent = lower((vi32)((vu32)(body + noise) >> 23), vi32{} + TOP);
  return exponent | (vi32)(((vu32)u >> 31) << SIGN);
}

template <int FORM>
FLCORE_INLINE vf32 natural_value(const vi32& code) {
  if constexpr (FORM == 0) {
    const vi32 exponent = lower(code & 0xff, vi32{} + 254);
    return (vf32)(exponent << 23 | (code >> 8) << 31);
  } else {
    const vi32 exponent = code & 0x7f;
    const vi32 body = exponent > 0 ? (exponent + NATURAL_SHIFT) << 23 : exponent;
    return (vf32)(body | (code >> 7) << 31);
  }
}

// 9 bits go through words, 8 bits through bytes
FLCORE_INLINE vi32 load_code(const uint16_t* p) { return load_u16(p); }
FLCORE_INLINE vi32 load_code(const uint8_t* p) { return load_u8(p); }
FLCORE_INLINE void store_code(uint16_t* p, const vi32& x) { store_u16(p, x); }
FLCORE_INLINE void store_code(uint8_t* p, const vi32& x) { store_u8(p, x); }

template <int FORM>
struct NaturalCode {
  typedef uint16_t type;
};
template <>
struct NaturalCode<1> {
  typedef uint8_t type;
};

template <int FORM, bool RANDOM>
FLCORE_INLINE vi32 natural_lanes(const vf32& u, const uint16_t* random, vf32& d) {
  vi32 noise = vi32{} + 0x400000;
  if constexpr (RANDOM) noise = (load_u16(random) << 7) + 64;
  const vi32 code = natural_cast<FORM>(u, noise);
  d = natural_value<FORM>(code);
  return code;
}

// One bucket, or several one after another.
template <int FORM, bool RANDOM>
static void quantize_powers(const BucketJob& job) {
  typedef typename NaturalCode<FORM>::type Code;
  const CodecArgs& c = job.c;
  uint8_t* codes = job.codes;
  for (int64_t at = 0; at < job.n; at += c.bucket, codes += c.code_stride) {
    const int64_t n = c.bucket < job.n - at ? c.bucket : job.n - at;
    Code* to = reinterpret_cast<Code*>(FORM == 0 ? reinterpret_cast<uint8_t*>(job.work) : codes);
    const float* u = job.u + at;
    const uint16_t* random = ahead(job.random, at);
    float* d = job.d + at;
    int64_t i = 0;
    vf32 y;
    for (; i + LANES <= n; i += LANES) {
      store_code(to + i, natural_lanes<FORM, RANDOM>(load<vf32>(u + i), ahead(random, i), y));
      store(d + i, y);
    }
    if (i < n) {
      vf32 x = {};
      uint16_t bits[LANES] = {};
      Code last[LANES];
      copy_some(&x, u + i, 4 * (n - i));
      if (RANDOM) copy_some(bits, random + i, 2 * (n - i));
      store_code(last, natural_lanes<FORM, RANDOM>(x, bits, y));
      copy_some(to + i, last, int64_t(sizeof(Code)) * (n - i));
      copy_some(d + i, &y, 4 * (n - i));
    }
    if constexpr (FORM == 0) pack_nines(to, n, codes);
  }
}

static inline void quantize_natural(const BucketJob& job) {
  if (job.c.form == 0)
    job.c.stochastic ? quantize_powers<0, true>(job) : quantize_powers<0, false>(job);
  else
    job.c.stochastic ? quantize_powers<1, true>(job) : quantize_powers<1, false>(job);
}

template <int FORM>
static void dequantize_powers(const PacketView& p, const Segment& s, float* out, float* work) {
  typedef typename NaturalCode<FORM>::type Code;
  for (int64_t bucket = s.bucket, at = s.begin, done = 0; done < s.n; ++bucket, at = 0) {
    const int64_t n = s.length - at < s.n - done ? s.length - at : s.n - done;
    const uint8_t* in = p.codes + bucket * p.code_stride + at * p.bits / 8;
    if constexpr (FORM == 0) unpack_nines(in, n, reinterpret_cast<uint16_t*>(work));
    const Code* code = reinterpret_cast<const Code*>(
        FORM == 0 ? reinterpret_cast<const uint8_t*>(work) : in);
    float* to = out + done;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, natural_value<FORM>(load_code(code + i)));
    if (i < n) {
      Code last[LANES] = {};
      copy_some(last, code + i, int64_t(sizeof(Code)) * (n - i));
      const vf32 values = natural_value<FORM>(load_code(last));
      copy_some(to + i, &values, 4 * (n - i));
    }
    done += n;
  }
}

static inline void dequantize_natural(const PacketView& p, const Segment& s, float* out,
                                      float* work) {
  if (p.form == 0)
    dequantize_powers<0>(p, s, out, work);
  else
    dequantize_powers<1>(p, s, out, work);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
