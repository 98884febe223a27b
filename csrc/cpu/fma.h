// Fused multiply-add with one rounding at every level: where the processor has no such instruction
// (base), it is put together from float64 and rounded to odd first, so that the bits agree.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

#if !defined(__AVX2__)
// a * b is exact in float64; the sum, rounded to odd there, rounds to float32 as the exact one does
FLCORE_INLINE float fma1(float a, float b, float c) {
  const double p = double(a) * double(b), s = p + double(c);
  const double back = s - p, error = (p - (s - back)) + (double(c) - back);  // Knuth's two-sum
  uint64_t u;
  __builtin_memcpy(&u, &s, 8);
  if ((error > 0 || error < 0) && !(u & 1)) {
    u += (error > 0) == (s > 0) ? 1 : -1;
    double odd;
    __builtin_memcpy(&odd, &u, 8);
    return float(odd);
  }
  return float(s);
}
#endif

FLCORE_INLINE vf32 vfma(vf32 a, vf32 b, vf32 c) {
#if defined(__AVX512F__)
  return (vf32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  vf32 r;
  for (int k = 0; k < LANES; ++k) r[k] = fma1(a[k], b[k], c[k]);
  return r;
#endif
}

// a b + c for sums that may differ between levels: an exact fma costs tens of instructions where
// the processor has none.
FLCORE_INLINE vf32 mac(const vf32& a, const vf32& b, const vf32& c) {
#if defined(__AVX2__)
  return vfma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace FLCORE_ISA
}  // namespace flcore
