// Vectors at the native width of the level being compiled, and loads and stores of the four
// storage types. Every conversion gives the same bits at every level, so element-wise kernels may
// use any width; reductions must fix their own number of lanes.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flcore {
namespace FLCORE_ISA {

#if defined(__AVX512F__)
constexpr int VEC_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VEC_BYTES = 32;
#else
constexpr int VEC_BYTES = 16;
#endif
constexpr int LANES = VEC_BYTES / 4;  // float32 lanes
constexpr int LANES64 = VEC_BYTES / 8;

typedef float vf32 __attribute__((vector_size(VEC_BYTES)));
typedef double vf64 __attribute__((vector_size(VEC_BYTES)));
typedef int32_t vi32 __attribute__((vector_size(VEC_BYTES)));
typedef uint32_t vu32 __attribute__((vector_size(VEC_BYTES)));
typedef int64_t vi64 __attribute__((vector_size(VEC_BYTES)));
typedef uint64_t vu64 __attribute__((vector_size(VEC_BYTES)));
typedef uint16_t vu16 __attribute__((vector_size(VEC_BYTES)));
typedef uint16_t vu16h __attribute__((vector_size(VEC_BYTES / 2)));  // LANES values of 16 bits
typedef float vf32h __attribute__((vector_size(VEC_BYTES / 2)));     // LANES64 float32 values

// Unaligned, alias-safe access.
template <class V>
FLCORE_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
FLCORE_INLINE void store(void* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

FLCORE_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
FLCORE_INLINE float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// ---- 16-bit types, one value ------------------------------------------------------------------

FLCORE_INLINE float f16_to_f32(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, body = uint32_t(h & 0x7fffu) << 13;
  if (body >= 0x7c00u << 13)  // infinity, NaN (quiet)
    return float_of(sign | 0x7f800000u | (body & 0x7fffffu) | ((body & 0x7fffffu) ? 0x400000u : 0u));
  // 2^112 moves the exponent bias from 15 to 127 and is exact for subnormals too
  return float_of(sign | bits_of(float_of(body) * 0x1p112f));
#endif
}

FLCORE_INLINE uint16_t f32_to_f16(float x) {  // round to nearest even
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, body = u & 0x7fffffffu;
  if (body > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((body >> 13) & 0x1ffu));
  if (body >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more
  if (body < 0x38800000u) {  // subnormal: the float adder rounds at 2^-24
    const float magic = 0.5f;  // ulp of 0.5 is 2^-24
    return uint16_t(sign | (bits_of(float_of(body) + magic) - bits_of(magic)));
  }
  return uint16_t(sign | ((body - 0x38000000u + 0xfffu + ((body >> 13) & 1u)) >> 13));
#endif
}

FLCORE_INLINE float bf16_to_f32(uint16_t h) { return float_of(uint32_t(h) << 16); }

FLCORE_INLINE uint16_t f32_to_bf16(float x) {  // round to nearest even
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// float64 -> float32 rounded to odd: a second rounding to 16 bits is then as good as one rounding
FLCORE_INLINE float f64_to_f32_odd(double d) {
  const float f = float(d);
  const double back = double(f);
  if (back == d || back != back) return f;
  const uint32_t u = bits_of(f);
  if (u & 1u) return f;
  const bool away = (d < 0 ? -back : back) > (d < 0 ? -d : d);
  return float_of(away ? u - 1u : u + 1u);
}

// ---- LANES values of 16 bits (gcc 12 splits the generic conversions into narrow pieces) --------

FLCORE_INLINE vi32 load_u16(const void* p) {
#if defined(__AVX512F__)
  return (vi32)_mm512_maskz_cvtepu16_epi32(__mmask16(0xffff), load<__m256i>(p));
#elif defined(__AVX2__)
  return (vi32)_mm256_cvtepu16_epi32(load<__m128i>(p));
#else
  return (vi32)__builtin_convertvector(load<vu16h>(p), vu32);
#endif
}

// values below 2^16
FLCORE_INLINE void store_u16(void* p, const vi32& x) {
#if defined(__AVX512F__)
  store(p, _mm512_maskz_cvtepi32_epi16(__mmask16(0xffff), (__m512i)x));
#elif defined(__AVX2__)
  const __m256i v = (__m256i)x;
  store(p, _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#elif defined(__SSE4_1__)
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi32((__m128i)x, (__m128i)x));
#else
  store(p, __builtin_convertvector((vu32)x, vu16h));
#endif
}

// The bits of bfloat16, rounded to nearest even; NaN stays NaN.
FLCORE_INLINE vi32 bf16_bits(const vf32& x) {
  const vu32 u = (vu32)x, even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
  return (vi32)((vi32)(u & 0x7fffffffu) > 0x7f800000 ? quiet : even);
}

// ---- one value and LANES values of a storage type, as float32 ---------------------------------

template <int D>
FLCORE_INLINE float load1(const void* p, int64_t i) {
  if (D == F64) {
    double d;
    __builtin_memcpy(&d, static_cast<const char*>(p) + 8 * i, 8);
    return float(d);
  } else if (D == F32) {
    float f;
    __builtin_memcpy(&f, static_cast<const char*>(p) + 4 * i, 4);
    return f;
  } else if (D == I8) {
    return float(static_cast<const int8_t*>(p)[i]);
  } else {
    uint16_t h;
    __builtin_memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
    return D == F16 ? f16_to_f32(h) : bf16_to_f32(h);
  }
}

template <int D>
FLCORE_INLINE vf32 load_f32(const void* p, int64_t i) {
  const char* at = static_cast<const char*>(p) + dtype_bytes(D) * i;
  if constexpr (D == F32) {
    return load<vf32>(at);
  } else if constexpr (D == F64) {
    const vf32h lo = __builtin_convertvector(load<vf64>(at), vf32h);
    const vf32h hi = __builtin_convertvector(load<vf64>(at + VEC_BYTES), vf32h);
    vf32 v;
    __builtin_memcpy(&v, &lo, VEC_BYTES / 2);
    __builtin_memcpy(reinterpret_cast<char*>(&v) + VEC_BYTES / 2, &hi, VEC_BYTES / 2);
    return v;
  } else if constexpr (D == BF16) {
    return (vf32)((vu32)load_u16(at) << 16);
  } else if constexpr (D == I8) {
#if defined(__AVX512F__)
    const __m512i q = _mm512_maskz_cvtepi8_epi32(__mmask16(0xffff), load<__m128i>(at));
    return __builtin_convertvector((vi32)q, vf32);
#elif defined(__AVX2__)
    return __builtin_convertvector((vi32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)),
                                   vf32);
#elif defined(__SSE4_1__)
    const __m128i q = _mm_cvtepi8_epi32(_mm_cvtsi32_si128(load<int32_t>(at)));
    return (vf32)_mm_cvtepi32_ps(q);
#else
    vf32 v;
    for (int k = 0; k < LANES; ++k) v[k] = load1<I8>(at, k);
    return v;
#endif
  } else {
#if defined(__AVX512F__)
    return (vf32)_mm512_maskz_cvtph_ps(__mmask16(0xffff), load<__m256i>(at));
#elif defined(__F16C__)
    return (vf32)_mm256_cvtph_ps(load<__m128i>(at));
#else
    vf32 v;
    for (int k = 0; k < LANES; ++k) v[k] = load1<F16>(at, k);
    return v;
#endif
  }
}

// The same of a type that is told at run time: F32, F16 or BF16.
FLCORE_INLINE float load1(int dtype, const void* p, int64_t i) {
  return dtype == F32 ? load1<F32>(p, i) : dtype == F16 ? load1<F16>(p, i) : load1<BF16>(p, i);
}
FLCORE_INLINE vf32 load_f32(int dtype, const void* p, int64_t i) {
  if (dtype == F32) return load_f32<F32>(p, i);
  return dtype == F16 ? load_f32<F16>(p, i) : load_f32<BF16>(p, i);
}

// ---- one value and LANES64 values of a storage type, as float64 -------------------------------

template <int D>
FLCORE_INLINE double load1_f64(const void* p, int64_t i) {
  if (D == F64) {
    double d;
    __builtin_memcpy(&d, static_cast<const char*>(p) + 8 * i, 8);
    return d;
  }
  return double(load1<D>(p, i));
}

template <int D>
FLCORE_INLINE vf64 load_f64(const void* p, int64_t i) {
  const char* at = static_cast<const char*>(p) + dtype_bytes(D) * i;
  if constexpr (D == F64) {
    return load<vf64>(at);
  } else if constexpr (D == F32) {
    return __builtin_convertvector(load<vf32h>(at), vf64);
  } else {
    vf32h f;
    for (int k = 0; k < LANES64; ++k) f[k] = load1<D>(at, k);
    return __builtin_convertvector(f, vf64);
  }
}

// ---- one value of a storage type out of an accumulator -----------------------------------------

template <int D>
FLCORE_INLINE void store1(void* p, int64_t i, float x) {
  char* at = static_cast<char*>(p) + dtype_bytes(D) * i;
  if constexpr (D == F64) {
    const double d = double(x);
    __builtin_memcpy(at, &d, 8);
  } else if constexpr (D == F32) {
    __builtin_memcpy(at, &x, 4);
  } else {
    const uint16_t h = D == F16 ? f32_to_f16(x) : f32_to_bf16(x);
    __builtin_memcpy(at, &h, 2);
  }
}

template <int D>
FLCORE_INLINE void store1(void* p, int64_t i, double x) {
  char* at = static_cast<char*>(p) + dtype_bytes(D) * i;
  if constexpr (D == F64)
    __builtin_memcpy(at, &x, 8);
  else
    store1<D>(p, i, D == F32 ? float(x) : f64_to_f32_odd(x));
}

// F32, F16 or BF16
FLCORE_INLINE void store1(int dtype, void* p, int64_t i, float x) {
  if (dtype == F32)
    store1<F32>(p, i, x);
  else if (dtype == F16)
    store1<F16>(p, i, x);
  else
    store1<BF16>(p, i, x);
}

// ---- square roots, correctly rounded ------------------------------------------------------------

FLCORE_INLINE vf32 vsqrt(const vf32& x) {
#if defined(__AVX512F__)
  return (vf32)_mm512_maskz_sqrt_ps(__mmask16(0xffff), (__m512)x);
#elif defined(__AVX2__)
  return (vf32)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vf32)_mm_sqrt_ps((__m128)x);
#else
  vf32 y;
  for (int k = 0; k < LANES; ++k) y[k] = __builtin_sqrtf(x[k]);
  return y;
#endif
}

FLCORE_INLINE vf64 vsqrt(const vf64& x) {
#if defined(__AVX512F__)
  return (vf64)_mm512_maskz_sqrt_pd(__mmask8(0xff), (__m512d)x);
#elif defined(__AVX2__)
  return (vf64)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
  return (vf64)_mm_sqrt_pd((__m128d)x);
#else
  vf64 y;
  for (int k = 0; k < LANES64; ++k) y[k] = __builtin_sqrt(x[k]);
  return y;
#endif
}

// ---- loops whose index is a constant -----------------------------------------------------------

// Arrays of vectors stay in registers only when every index is known when the loop is written out.
template <int I>
struct Const {
  static constexpr int value = I;
};

#define FLCORE_LAMBDA __attribute__((always_inline))

// body(Const<0>()), body(Const<1>()), .. , body(Const<N - 1>())
template <int N, int FIRST = 0, class Body>
FLCORE_INLINE void unroll(const Body& body) {
  if constexpr (N == 1) {
    body(Const<FIRST>());
  } else if constexpr (N > 1) {
    unroll<N / 2, FIRST>(body);
    unroll<N - N / 2, FIRST + N / 2>(body);
  }
}

// ---- LANES float32 or LANES64 float64 values into a storage type ------------------------------

template <int D>
FLCORE_INLINE void store_lanes(void* p, int64_t i, const vf32& x) {
  char* at = static_cast<char*>(p) + dtype_bytes(D) * i;
  if constexpr (D == F32) {
    store(at, x);
  } else if constexpr (D == BF16) {
    store_u16(at, bf16_bits(x));
#if defined(__AVX512F__)
  } else if constexpr (D == F16) {
    store(at, _mm512_maskz_cvtps_ph(__mmask16(0xffff), (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  } else if constexpr (D == F16) {
    store(at, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int k = 0; k < LANES; ++k) store1<D>(at, k, x[k]);
  }
}

template <int D>
FLCORE_INLINE void store_lanes(void* p, int64_t i, const vf64& x) {
  char* at = static_cast<char*>(p) + dtype_bytes(D) * i;
  if constexpr (D == F64)
    store(at, x);
  else
    for (int k = 0; k < LANES64; ++k) store1<D>(at, k, double(x[k]));
}

}  // namespace FLCORE_ISA
}  // namespace flcore
