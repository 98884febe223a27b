// Elementary functions and element maps of the row losses, for vectors of float32 and float64 and
// for single values. Only + - * /, comparisons and integer operations in a fixed order, no fused
// multiply-add: the same bits at every level. Polynomials are minimax fits (Remez exchange) made
// for the ranges given here.
//
// Element maps (Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability",
// ICLR 2025): f = exp; StableMax s(z) = a for z >= 0 and 1/a below, a = 1 + |z|; Taylor
// 1 + z + z^2/2. rho = f'/f. A logit of -inf masks its class: f = f' = rho = 0.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/network.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

template <class V>
struct Real;
template <>
struct Real<vf32> {
  typedef float T;
  typedef vi32 I;
  typedef int32_t N;
  typedef vu32 U;
  static constexpr int WIDTH = LANES;
  static constexpr int MANTISSA = 23, BIAS = 127, LEAST = -125;
  static constexpr float MAGIC = 0x1.8p23f;  // adding it rounds to an integer
  static constexpr float LOG2E = 0x1.715476p+0f;
  // ln 2 = HI + LO; products of HI with integers up to 2^10 are exact
  static constexpr float LN2_HI = 0x1.62ep-1f, LN2_LO = 0x1.0bfbe8p-15f;
  static constexpr float SPLIT = 256, LOWEST = -400, HIGHEST = 89, TINY = 0x1p-126f, LIFT = 0x1p24f;
  static constexpr int LIFT_BITS = 24;
  // exp(r) = 1 + r + r^2 P(r), |r| <= ln(2)/2, to 3.1e-9
  static constexpr int EXP_TERMS = 5;
  static constexpr float EXP[EXP_TERMS] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f4p-5f,
                                           0x1.123a2p-7f, 0x1.6a23c8p-10f};
  // ln((1 + s)/(1 - s)) = 2 s + s z P(z), z = s^2 <= (3 - 2 sqrt(2))^2, to 1.7e-9
  static constexpr int LOG_TERMS = 3;
  static constexpr float LOG[LOG_TERMS] = {0x1.55557ap-1f, 0x1.995e9cp-2f, 0x1.31e678p-2f};
};
template <>
struct Real<vf64> {
  typedef double T;
  typedef vi64 I;
  typedef int64_t N;
  typedef vu64 U;
  static constexpr int WIDTH = LANES64;
  static constexpr int MANTISSA = 52, BIAS = 1023, LEAST = -1020;
  static constexpr double MAGIC = 0x1.8p52;
  static constexpr double LOG2E = 0x1.71547652b82fep+0;
  static constexpr double LN2_HI = 0x1.62e42fefap-1, LN2_LO = 0x1.cf79abc9e3b3ap-40;
  static constexpr double SPLIT = 2048, LOWEST = -4000, HIGHEST = 710, TINY = 0x1p-1022,
                          LIFT = 0x1p54;
  static constexpr int LIFT_BITS = 54;
  // to 3.7e-18
  static constexpr int EXP_TERMS = 10;
  static constexpr double EXP[EXP_TERMS] = {
      0x1.000000000000ap-1,  0x1.55555555554f9p-3,  0x1.555555555083fp-5,  0x1.1111111127d05p-7,
      0x1.6c16c18438ab3p-10, 0x1.a01a012a11caep-13, 0x1.a01999e26baabp-16, 0x1.71df25ae6b8eap-19,
      0x1.28ad9b8387350p-22, 0x1.ad7f44a01e787p-26};
  // to 2.5e-18
  static constexpr int LOG_TERMS = 7;
  static constexpr double LOG[LOG_TERMS] = {
      0x1.5555555555593p-1, 0x1.999999997fb2dp-2, 0x1.2492494217d42p-2, 0x1.c71c51e7d4c9ap-3,
      0x1.74664632d693bp-3, 0x1.39a0f46cebf34p-3, 0x1.2f0d94288c9c5p-3};
};

template <class V>
FLCORE_INLINE V splat(typename Real<V>::T x) {
  return V{} + x;
}
template <class V>
FLCORE_INLINE V vabs(V x) {
  typedef typename Real<V>::U U;
  return (V)((U)x & ~((U{} + 1) << (Real<V>::MANTISSA == 23 ? 31 : 63)));
}
template <class V>
FLCORE_INLINE V with_sign(V magnitude, V sign) {
  typedef typename Real<V>::U U;
  const U top = (U{} + 1) << (Real<V>::MANTISSA == 23 ? 31 : 63);
  return (V)(((U)magnitude & ~top) | ((U)sign & top));
}

// Whether a lane of a mask (0 or all ones) is set.
template <class I>
FLCORE_INLINE bool any_lane(const I& mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  const vi64 m = (vi64)mask;
  int64_t any = 0;
  for (int k = 0; k < LANES64; ++k) any |= m[k];
  return any != 0;
#endif
}

// ---- exp ----------------------------------------------------------------------------------------

// exp(r) - 1 for |r| <= ln(2)/2
template <class V>
FLCORE_INLINE V exp_rest(V r) {
  typedef Real<V> R;
  V p = splat<V>(R::EXP[R::EXP_TERMS - 1]);
#pragma GCC unroll 16
  for (int i = R::EXP_TERMS - 2; i >= 0; --i) p = p * r + R::EXP[i];
  return r + r * r * p;
}

// x = k ln2 + r, k integral; exact up to the last rounding of r while |k| <= 1024 (double 4096)
template <class V>
FLCORE_INLINE V exp_reduce(V x, V& k) {
  typedef Real<V> R;
  k = (x * R::LOG2E + R::MAGIC) - R::MAGIC;
  return (x - k * R::LN2_HI) - k * R::LN2_LO;
}

// 2^k for integral k in (-BIAS, BIAS]; anything for others
template <class V>
FLCORE_INLINE V two_to(V k) {
  typedef Real<V> R;
  typedef typename R::U U;
  return (V)((U)(k + (R::MAGIC + R::BIAS)) << R::MANTISSA);
}

// The compiler computes v at this place of the program and not where it is used.
template <class V>
FLCORE_INLINE void here(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
}

// 0 where k is below LEAST, else e 2^k; NaN stays
FLCORE_INLINE vf32 exp_scaled(vf32 e, vf32 k) {
#if defined(__AVX512F__)
  // not less than: true for NaN
  const __mmask16 keep =
      _mm512_cmp_ps_mask((__m512)k, (__m512)splat<vf32>(Real<vf32>::LEAST), _CMP_NLT_UQ);
  return (vf32)_mm512_maskz_scalef_ps(keep, (__m512)e, (__m512)k);
#else
  return (vf32)((vi32)(e * two_to(k)) & ~(k < float(Real<vf32>::LEAST)));
#endif
}
FLCORE_INLINE vf64 exp_scaled(vf64 e, vf64 k) {
#if defined(__AVX512F__)
  const __mmask8 keep =
      _mm512_cmp_pd_mask((__m512d)k, (__m512d)splat<vf64>(Real<vf64>::LEAST), _CMP_NLT_UQ);
  return (vf64)_mm512_maskz_scalef_pd(keep, (__m512d)e, (__m512d)k);
#else
  return (vf64)((vi64)(e * two_to(k)) & ~(k < double(Real<vf64>::LEAST)));
#endif
}

// y := exp(y) 2^-n (SHIFTED; else exp(y)) for integral n and y <= n ln2 + 1: to about 1 ulp, 0 below 2^-125 (float64:
// 2^-1020) and at -inf, NaN at NaN. |n| <= SPLIT log2(e). What lies so low that k is off is 0 in the
// end. N vectors step by step: one after the other, their chains of dependent operations would fill
// the processor's queues.
template <bool SHIFTED, int N, class V>
FLCORE_INLINE void row_exp_lanes(V (&y)[N], V n) {
  typedef Real<V> R;
  V k[N], r[N], p[N];
#define FLCORE_EACH(expression) \
  _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i) expression
  FLCORE_EACH(k[i] = y[i] * R::LOG2E);
  FLCORE_EACH(k[i] = k[i] + R::MAGIC);
  FLCORE_EACH(k[i] = k[i] - R::MAGIC);
  FLCORE_EACH(r[i] = y[i] - k[i] * R::LN2_HI);
  FLCORE_EACH(r[i] = r[i] - k[i] * R::LN2_LO);
  FLCORE_EACH(p[i] = splat<V>(R::EXP[R::EXP_TERMS - 1]));
#pragma GCC unroll 16
  for (int j = R::EXP_TERMS - 2; j >= 0; --j)
    FLCORE_EACH((p[i] = p[i] * r[i] + R::EXP[j], here(p[i])));
  FLCORE_EACH(p[i] = r[i] + r[i] * r[i] * p[i]);
  FLCORE_EACH(p[i] = 1 + p[i]);
  FLCORE_EACH(y[i] = exp_scaled(p[i], SHIFTED ? k[i] - n : k[i]));
#undef FLCORE_EACH
}
template <class V>
FLCORE_INLINE V row_exp(V y, V n) {
  V one[1] = {y};
  row_exp_lanes<true>(one, n);
  return one[0];
}

// exp(x) for any x: 0 below 2^-125 (2^-1020), inf where it overflows
template <class V>
FLCORE_INLINE V row_exp_full(V x) {
  typedef Real<V> R;
  V k;
  const V r = exp_reduce(vmin(splat<V>(R::HIGHEST), vmax(splat<V>(R::LOWEST), x)), k);
  const V e = 1 + exp_rest(r);
  const V y = e * two_to(k - 1) * 2;
  return k < typename R::T(R::LEAST) ? V{} : y;
}

// exp(x) - 1, relative error a few ulp
template <class V>
FLCORE_INLINE V row_expm1(V x) {
  typedef Real<V> R;
  V k;
  const V r = exp_reduce(vmin(splat<V>(R::HIGHEST), vmax(splat<V>(-60), x)), k);
  const V rest = exp_rest(r), half = two_to(k - 1);
  return k == V{} ? rest : (rest * half + (half - typename R::T(0.5))) * 2;
}

// How exp(x - m) is taken without the rounding of x - m: the differences x - c are exact for all x
// that count, because c is 0 or (Sterbenz) so large that only x > c/2 do, and exp(x - m) is
// row_exp(x - c, n) times a factor of the row near 1.
template <class V>
FLCORE_INLINE void row_shift(V m, V& c, V& n) {
  typedef Real<V> R;
  c = vabs(m) > R::SPLIT ? m : V{};
  n = ((m - c) * R::LOG2E + R::MAGIC) - R::MAGIC;
}
// exp(c + n ln2 - m)
template <class V>
FLCORE_INLINE V row_factor(V m, V c, V n) {
  typedef Real<V> R;
  return 1 + exp_rest(n * R::LN2_LO - ((m - c) - n * R::LN2_HI));
}

// ---- log ----------------------------------------------------------------------------------------

// ln(w + lost) + exponent ln 2 for w > 0 normal and lost at most its rounding error
template <bool LOST, class V>
FLCORE_INLINE V log_parts(V w, V lost, V exponent) {
  typedef Real<V> R;
  typedef typename R::U U;
  // w = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  const U root = (U)splat<V>(typename R::T(0x1.6a09e667f3bcdp-1)), one = (U)splat<V>(1);
  const U shifted = (U)w + (one - root), biased = shifted >> R::MANTISSA;
  const V e = ((V)(biased + (U)splat<V>(R::MAGIC)) - (R::MAGIC + R::BIAS)) + exponent;
  const U below = ((U{} + 1) << R::MANTISSA) - 1;
  V f = (V)((shifted & below) + root) - 1;
  if (LOST) f += lost * (V)((2 * R::BIAS - biased) << R::MANTISSA);
  const V s = f / (f + 2), z = s * s;
  V p = splat<V>(R::LOG[R::LOG_TERMS - 1]);
#pragma GCC unroll 8
  for (int i = R::LOG_TERMS - 2; i >= 0; --i) p = p * z + R::LOG[i];
  // 2 s = f - s f
  return (f + (e * R::LN2_LO - s * (f - z * p))) + e * R::LN2_HI;
}

template <class V>
FLCORE_INLINE V log_special(V x, V y) {
  typedef typename Real<V>::T T;
  const V inf = splat<V>(T(__builtin_inf())), nan = splat<V>(T(__builtin_nan("")));
  y = x == V{} ? -inf : y;
  return x < inf ? (x < V{} ? nan : y) : x;  // +inf and NaN stay
}

// ln x: relative error about 1 ulp
template <class V>
FLCORE_INLINE V row_log(V x) {
  typedef Real<V> R;
  const auto low = x < R::TINY;
  const V w = low ? x * R::LIFT : x;
  return log_special(x, log_parts<false>(w, V{}, low ? splat<V>(-R::LIFT_BITS) : V{}));
}

// ln(1 + u): relative error about 1.5 ulp, u itself where u is tiny
template <class V>
FLCORE_INLINE V row_log1p(V u) {
  typedef Real<V> R;
  const V w = u + 1;
  // what rounding w lost; w - 1 is exact below LIFT, and beyond it the loss is of no account
  const V lost = u - (w - 1);
  const V y = log_parts<true>(w, u < R::LIFT ? lost : V{}, V{});
  return log_special(w, y);
}

// ---- element maps -------------------------------------------------------------------------------

// f(z) and f'(z), without the prior; exp: of z - c, times 2^-n
template <int MAP, class V>
FLCORE_INLINE void row_map(V z, V c, V n, V& f, V& d) {
  typedef typename Real<V>::T T;
  if constexpr (MAP == ROW_SOFTMAX) {
    f = d = row_exp(z - c, n);
  } else if constexpr (MAP == ROW_STABLEMAX) {
    const V a = vabs(z) + 1, r = 1 / a;
    const auto up = z >= V{};
    f = up ? a : r;
    d = up ? splat<V>(1) : r * r;
  } else {
    const auto masked = z == splat<V>(T(-__builtin_inf()));
    const V w = z + 1;  // 1 + z + z^2/2 = (w^2 + 1)/2 has no cancellation
    f = masked ? V{} : (w * w + 1) * T(0.5);
    d = masked ? V{} : w;
  }
}

// The same of N vectors; c = n = 0 unless SHIFTED.
template <int MAP, bool SHIFTED, int N, class V>
FLCORE_INLINE void row_map_lanes(const V (&z)[N], V c, V n, V (&f)[N], V (&d)[N]) {
  if constexpr (MAP == ROW_SOFTMAX) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) f[i] = SHIFTED ? z[i] - c : z[i];
    row_exp_lanes<SHIFTED>(f, n);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) d[i] = f[i];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) row_map<MAP>(z[i], c, n, f[i], d[i]);
  }
}

// f'/f
template <int MAP, class V>
FLCORE_INLINE V row_rho(V z) {
  typedef typename Real<V>::T T;
  if constexpr (MAP == ROW_SOFTMAX) {
    return z == splat<V>(T(-__builtin_inf())) ? V{} : splat<V>(1);
  } else if constexpr (MAP == ROW_STABLEMAX) {
    return 1 / (vabs(z) + 1);
  } else {
    const V w = z + 1;
    return z == splat<V>(T(-__builtin_inf())) ? V{} : w / ((w * w + 1) * T(0.5));
  }
}

// ln f
template <int MAP, class V>
FLCORE_INLINE V row_log_map(V z) {
  typedef typename Real<V>::T T;
  if constexpr (MAP == ROW_SOFTMAX) {
    return z;
  } else if constexpr (MAP == ROW_STABLEMAX) {
    return with_sign(row_log1p(vabs(z)), z);
  } else {
    const V w = z + 1, inf = splat<V>(T(__builtin_inf()));
    return z == -inf ? -inf : row_log((w * w + 1) * T(0.5));
  }
}

// ---- one value: lane 0 of the vector code -------------------------------------------------------

FLCORE_INLINE float row_exp(float y, float n) { return row_exp(splat<vf32>(y), splat<vf32>(n))[0]; }
FLCORE_INLINE double row_exp(double y, double n) {
  return row_exp(splat<vf64>(y), splat<vf64>(n))[0];
}
FLCORE_INLINE float row_factor(float m, float c, float n) {
  return row_factor(splat<vf32>(m), splat<vf32>(c), splat<vf32>(n))[0];
}
FLCORE_INLINE double row_factor(double m, double c, double n) {
  return row_factor(splat<vf64>(m), splat<vf64>(c), splat<vf64>(n))[0];
}
FLCORE_INLINE void row_shift(float m, float& c, float& n) {
  vf32 cs, ns;
  row_shift(splat<vf32>(m), cs, ns);
  c = cs[0], n = ns[0];
}
FLCORE_INLINE void row_shift(double m, double& c, double& n) {
  vf64 cs, ns;
  row_shift(splat<vf64>(m), cs, ns);
  c = cs[0], n = ns[0];
}
#define FLCORE_ONE_VALUE(name)                                             \
  FLCORE_INLINE float name(float x) { return name(splat<vf32>(x))[0]; }    \
  FLCORE_INLINE double name(double x) { return name(splat<vf64>(x))[0]; }
FLCORE_ONE_VALUE(row_exp_full)
FLCORE_ONE_VALUE(row_expm1)
FLCORE_ONE_VALUE(row_log)
FLCORE_ONE_VALUE(row_log1p)
#undef FLCORE_ONE_VALUE

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
