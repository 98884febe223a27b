// Codes on an evenly spaced grid: sign, ternary, uniform (absolute maximum or Euclidean norm), affine.
//   sign     a = mean |u| or ||u|| / sqrt(n); code 1 where u < 0; D = a or -a
//   ternary  a = max |u|, at most clip ||u|| / sqrt(n); q = round(u / a) in {-1, 0, 1}; D = a q
//   uniform  unit = max |u| / levels or ||u|| / levels; q = round(u / unit) within +-levels; D = unit q
//   affine   lo = min u, unit = (max u - lo) / (2^b - 1); q = round((u - lo) / unit); D = lo + unit q
// The quotient is the product with the rounded inverse of the unit, which is 0 or at least 2^-126.
// round is half to even, or floor(y + r) with r a uniform random number: E D = u. All arithmetic is
// float32, each operation rounded; sums are float64 in 16 lanes (lane c % 16 takes coordinate c), then
// lanes 8, 4, 2 and 1 apart are added: the same bits at every level. Scales are made smaller where a
// code would otherwise decode to more than WIRE_LARGEST; values beyond the grid take its last point.
// Sources: Alistarh et al., "QSGD", NeurIPS 2017; Karimireddy et al., "Error Feedback Fixes SignSGD",
// ICML 2019; Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Wen et al., "TernGrad", 2017.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/codes.h"
#include "cpu/codes_measure.h"
#include "cpu/codes_pack.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// ---- one grid for ternary, uniform and affine ----------------------------------------------------

// q = round(clamp((u - lo) * inverse)), code = q + shift, D = unit q, plus lo when affine
struct Grid {
  float lo, unit, inverse, least, most;
  int32_t shift;
};

FLCORE_INLINE void store_codes(uint8_t* out, const vi32& code) {
#if defined(__AVX512F__)
  store(out, _mm512_maskz_cvtepi32_epi8(__mmask16(0xffff), (__m512i)code));
#elif defined(__AVX2__)
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)code),
                                        _mm256_extracti128_si256((__m256i)code, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(half, half));
#elif defined(__SSE4_1__)
  const __m128i half = _mm_packus_epi32((__m128i)code, (__m128i)code);
  store(out, int32_t(_mm_cvtsi128_si32(_mm_packus_epi16(half, half))));
#else
  for (int k = 0; k < LANES; ++k) out[k] = uint8_t(code[k]);
#endif
}
FLCORE_INLINE void store_codes(uint8_t* out, int32_t code) { *out = uint8_t(code); }

// D or, where it is the residual that is wanted, u - D
template <bool REST, class V>
FLCORE_INLINE void store_decoded(const BucketJob& job, int64_t i, const V& u, const V& d) {
  if constexpr (REST)
    store(job.d + i, V(u - d));
  else
    store(job.d + i, d);
}

template <bool AFFINE, bool STOCHASTIC, bool REST, class V>
FLCORE_INLINE void grid_step(const Grid& g, const BucketJob& job, int64_t i, uint8_t* codes) {
  const V u = load<V>(job.u + i);
  V y = u;
  if constexpr (AFFINE) y = y - g.lo;
  y = y * g.inverse;
  const V least = V{} + g.least, most = V{} + g.most;
  y = y < least ? least : y;
  y = y > most ? most : y;
  V value;
  const auto q = round_code<STOCHASTIC>(y, job.random, i, value);
  store_codes(codes + i, q + g.shift);
  V d = g.unit * value;
  if constexpr (AFFINE) d = g.lo + d;
  store_decoded<REST>(job, i, u, d);
}

template <bool AFFINE, bool STOCHASTIC, bool REST>
static void grid_codes(const Grid& g, const BucketJob& job, uint8_t* codes) {
  const int64_t n = job.n;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) grid_step<AFFINE, STOCHASTIC, REST, vf32>(g, job, i, codes);
  if (i < n && n >= LANES) {
    grid_step<AFFINE, STOCHASTIC, REST, vf32>(g, job, n - LANES, codes);  // some of it once more
    return;
  }
  for (; i < n; ++i) grid_step<AFFINE, STOCHASTIC, REST, float>(g, job, i, codes);
}

template <bool AFFINE, bool REST>
static void put_grid(const Grid& grid, const BucketJob& job) {
  Grid g = grid;
  g.inverse = g.unit > 0 ? 1.0f / g.unit : 0.0f;  // a bucket of one value: everything is 0
  const bool whole = job.c.bits == 8;
  uint8_t* codes = whole ? job.codes : reinterpret_cast<uint8_t*>(job.work);
  if (job.c.stochastic)
    grid_codes<AFFINE, true, REST>(g, job, codes);
  else
    grid_codes<AFFINE, false, REST>(g, job, codes);
  if (job.c.codec == CODEC_TERNARY && job.c.form == 1)
    pack_trits(codes, job.n, job.codes);
  else if (!whole)
    pack_codes(job.c.bits, codes, job.n, job.codes);
}

template <bool REST>
static void put_uniform(const Measured& m, const BucketJob& job) {
  const CodecArgs& c = job.c;
  const double norm = c.measure == MEASURE_L2 ? __builtin_sqrt(m.sum) / double(c.levels)
                                              : double(m.top / float(c.levels));
  const float unit = scale_value(float(norm), scale_limit(double(1 << (c.bits - 1))), c.scale_dtype);
  store_scale(job.scales, 0, unit, c.scale_dtype);
  const float levels = float(c.levels);
  put_grid<false, REST>({0, unit, 0, -levels, levels, (1 << (c.bits - 1)) - 1}, job);
}

template <bool REST>
static void put_ternary(const Measured& m, const BucketJob& job) {
  const CodecArgs& c = job.c;
  float a = m.top;
  if (c.clip > 0) {
    const float bound = float(c.clip * __builtin_sqrt(m.sum / double(job.n)));
    a = bound < a ? bound : a;
  }
  a = scale_value(a, scale_limit(2), c.scale_dtype);
  store_scale(job.scales, 0, a, c.scale_dtype);
  put_grid<false, REST>({0, a, 0, -1, 1, 1}, job);
}

// The stored forms of the two numbers of a bucket, at most WIRE_LARGEST together.
static inline Ends affine_scales(double low, double high, int64_t steps, int dtype) {
  const float least = float(low), limit = scale_limit(1);
  Ends e;
  if (least < 0)
    e.low = -scale_value(-least, limit, dtype);
  else
    e.low = dtype == BF16 ? float_of(bits_of(least) & 0xffff0000u) : least < limit ? least : limit;
  const double size = e.low < 0 ? -double(e.low) : double(e.low);
  float most = scale_limit(double(steps));
  const double rest = (WIRE_LARGEST - size) / double(steps);
  if (rest < double(most)) {
    most = float(rest);
    while (most > 0 && size + double(steps) * double(most) > WIRE_LARGEST)
      most = float_of(bits_of(most) - 1);
  }
  const double unit = (high - double(e.low)) / double(steps);
  e.high = scale_value(unit > 0 ? float(unit) : 0.0f, most, dtype);
  return e;
}

// One bit: code 1 for values >= 0, whatever is nearer.
static inline void put_two_means(const Ends& e, const BucketJob& job) {
  uint8_t* codes = reinterpret_cast<uint8_t*>(job.work);
  const float high = e.low + e.high;
  for (int64_t i = 0; i < job.n; ++i) {
    const bool other = load<float>(job.u + i) < 0;
    codes[i] = other ? 0 : 1;
    job.d[i] = other ? e.low + 0.0f : high;
  }
  pack_codes(1, codes, job.n, job.codes);
}

static inline void quantize_affine(const BucketJob& job) {
  const CodecArgs& c = job.c;
  const int64_t steps = (1 << c.bits) - 1;
  Ends e;
  if (c.measure == MEASURE_TWO_MEANS) {
    const double below = lane_sum<CountNegative>(job.u, job.n);
    const double negative = lane_sum<SumNegative>(job.u, job.n);
    const double positive = lane_sum<SumPositive>(job.u, job.n);
    const double above = double(job.n) - below;
    const double high = above > 0 ? positive / above : negative / below;
    e = affine_scales(below > 0 ? negative / below : high, high, steps, c.scale_dtype);
  } else {
    const Ends raw = ends_of(job.u, job.n);
    e = affine_scales(double(raw.low), double(raw.high), steps, c.scale_dtype);
  }
  store_scale(job.scales, 0, e.low, c.scale_dtype);
  store_scale(job.scales, 1, e.high, c.scale_dtype);
  if (c.measure == MEASURE_TWO_MEANS)
    put_two_means(e, job);
  else
    put_grid<true, false>({e.low, e.high, 0, 0, float(steps), 0}, job);
}

// ---- sign ----------------------------------------------------------------------------------------

FLCORE_INLINE uint32_t sign_lanes(const vi32& x) {  // bit k: the top bit of lane k
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)x));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps((__m128)x));
#else
  uint32_t mask = 0;
  for (int k = 0; k < LANES; ++k) mask |= uint32_t(x[k] < 0) << k;
  return mask;
#endif
}

template <bool REST>
static void put_sign(const Measured& m, const BucketJob& job) {
  const CodecArgs& c = job.c;
  const double n = double(job.n);
  const double a = c.measure == MEASURE_L2 ? __builtin_sqrt(m.sum / n) : m.sum / n;
  const float scale = scale_value(float(a), scale_limit(1), c.scale_dtype);
  store_scale(job.scales, 0, scale, c.scale_dtype);
  const vi32 size = vi32{} + int32_t(bits_of(scale));
  int64_t i = 0;
  for (; i + 16 <= job.n; i += 16) {
    uint32_t word = 0;
    for (int k = 0; k < 16; k += LANES) {
      const vf32 u = load<vf32>(job.u + i + k);
      const vi32 below = u < 0;
      store_decoded<REST>(job, i + k, u, (vf32)(size | (below & int32_t(0x80000000u))));
      word |= sign_lanes(below) << k;
    }
    store(job.codes + i / 8, uint16_t(word));
  }
  for (; i < job.n; i += 8) {
    uint32_t byte = 0;
    for (int64_t k = 0; k < 8 && i + k < job.n; ++k) {
      const float u = load<float>(job.u + i + k);
      byte |= uint32_t(u < 0) << k;
      store_decoded<REST>(job, i + k, u, u < 0 ? -scale : scale);
    }
    job.codes[i / 8] = uint8_t(byte);
  }
}

// ---- codecs of one scale -------------------------------------------------------------------------

static inline bool has_one_scale(int codec) {
  return codec == CODEC_SIGN || codec == CODEC_UNIFORM || codec == CODEC_TERNARY;
}

// REST: u - D goes where D is asked for.
template <bool REST>
static void quantize_scaled(const Measured& m, const BucketJob& job) {
  switch (job.c.codec) {
    case CODEC_SIGN: return put_sign<REST>(m, job);
    case CODEC_UNIFORM: return put_uniform<REST>(m, job);
    case CODEC_TERNARY: return put_ternary<REST>(m, job);
  }
}
static inline void quantize_scaled(const BucketJob& job) {
  quantize_scaled<false>(measured(job), job);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
