// Stored values as LANES64 float64 values and back, rounded once: arithmetic in float64 on any
// storage type. The same bits at every level.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

typedef int32_t vi32h __attribute__((vector_size(VEC_BYTES / 2)));  // LANES64 values of 32 bits

// ---- float32 to float64 and back, LANES64 values (gcc 12 splits the generic conversions) -------

#if defined(__AVX512F__)
FLCORE_INLINE vf64 widen(const vf32h& x) {
  return (vf64)_mm512_maskz_cvtps_pd(__mmask8(0xff), (__m256)x);
}
FLCORE_INLINE vf32h narrow(const vf64& x) {
  return (vf32h)_mm512_maskz_cvtpd_ps(__mmask8(0xff), (__m512d)x);
}
#elif defined(__AVX2__)
FLCORE_INLINE vf64 widen(const vf32h& x) { return (vf64)_mm256_cvtps_pd((__m128)x); }
FLCORE_INLINE vf32h narrow(const vf64& x) { return (vf32h)_mm256_cvtpd_ps((__m256d)x); }
#elif defined(__x86_64__)
FLCORE_INLINE vf64 widen(const vf32h& x) {
  return (vf64)_mm_cvtps_pd(_mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(&x))));
}
FLCORE_INLINE vf32h narrow(const vf64& x) {
  const __m128 v = _mm_cvtpd_ps((__m128d)x);
  return load<vf32h>(&v);
}
#else
FLCORE_INLINE vf64 widen(const vf32h& x) { return __builtin_convertvector(x, vf64); }
FLCORE_INLINE vf32h narrow(const vf64& x) { return __builtin_convertvector(x, vf32h); }
#endif

template <int D>
FLCORE_INLINE vf64 load_wide(const void* x, int64_t i) {
  const char* at = static_cast<const char*>(x) + dtype_bytes(D) * i;
  if constexpr (D == F64) return load<vf64>(at);
  if constexpr (D == F32) return widen(load<vf32h>(at));
#if defined(__AVX512F__)
  if constexpr (D == F16) return widen((vf32h)_mm256_cvtph_ps(load<__m128i>(at)));
  if constexpr (D == BF16)
    return widen((vf32h)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(at)), 16));
#elif defined(__AVX2__)
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  if constexpr (D == F16) return widen((vf32h)_mm_cvtph_ps(half));
  if constexpr (D == BF16) return widen((vf32h)_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
#endif
  return load_f64<D>(x, i);
}

// ---- rounding to a storage type ------------------------------------------------------------------

// As f64_to_f32_odd: of the two neighbours the one whose last bit is set
FLCORE_INLINE vf32h to_f32_odd(const vf64& d) {
  const vf32h near = narrow(d);
  const vf64 back = widen(near);
  const vi64 inexact = (back != d) & (d == d), away = (d < 0.0) ? (back < d) : (back > d);
  const vi32h u = (vi32h)near;
  const vi32h to_even = __builtin_convertvector(inexact, vi32h) & ((u & 1) - 1);
  const vi32h step = __builtin_convertvector(away, vi32h) | 1;  // -1 when near is too far out
  return (vf32h)(u + (to_even & step));
}

template <int D>
FLCORE_INLINE void store_pair(void* out, int64_t i, const vf64& a, const vf64& b) {
  char* at = static_cast<char*>(out) + dtype_bytes(D) * i;
  if constexpr (D == F64) {
    store(at, a);
    store(at + VEC_BYTES, b);
  } else if constexpr (D == F32) {
    store(at, narrow(a));
    store(at + VEC_BYTES / 2, narrow(b));
  } else {
    vf32 both;
    store(&both, to_f32_odd(a));
    store(reinterpret_cast<char*>(&both) + VEC_BYTES / 2, to_f32_odd(b));
    store_lanes<D>(at, 0, both);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
