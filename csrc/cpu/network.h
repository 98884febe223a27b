// The sorting networks of csrc/batcher.h applied to vectors of coordinates.
#pragma once

#include "batcher.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// Spelled out: gcc does not turn `a < b ? a : b` into one instruction at every width.
FLCORE_INLINE vf32 vmin(vf32 a, vf32 b) {
#if defined(__AVX512F__)
  return (vf32)_mm512_maskz_min_ps(__mmask16(0xffff), (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf32)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf32)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
FLCORE_INLINE vf32 vmax(vf32 a, vf32 b) {
#if defined(__AVX512F__)
  return (vf32)_mm512_maskz_max_ps(__mmask16(0xffff), (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf32)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf32)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
FLCORE_INLINE vf64 vmin(vf64 a, vf64 b) {
#if defined(__AVX512F__)
  return (vf64)_mm512_maskz_min_pd(__mmask8(0xff), (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vf64)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif defined(__x86_64__)
  return (vf64)_mm_min_pd((__m128d)a, (__m128d)b);
#else
  return a < b ? a : b;
#endif
}
FLCORE_INLINE vf64 vmax(vf64 a, vf64 b) {
#if defined(__AVX512F__)
  return (vf64)_mm512_maskz_max_pd(__mmask8(0xff), (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vf64)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__x86_64__)
  return (vf64)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

template <class V>
FLCORE_INLINE void exchange(V& low, V& high) {
  const V least = vmin(low, high);
  high = vmax(low, high);
  low = least;
}

// Compare-exchanges BEGIN .. END - 1 of a network on the wires v, all indices constants.
template <class Net, int BEGIN, int END, class V>
FLCORE_INLINE void run_network(V* v) {
  if constexpr (END - BEGIN == 1) {
    constexpr int A = Net::net.low[BEGIN], B = Net::net.high[BEGIN], K = Net::net.keep[BEGIN];
    if constexpr (K == KEEP_BOTH)
      exchange(v[A], v[B]);
    else if constexpr (K == KEEP_LOW)
      v[A] = vmin(v[A], v[B]);
    else
      v[B] = vmax(v[A], v[B]);
  } else if constexpr (END > BEGIN) {
    constexpr int MIDDLE = (BEGIN + END) / 2;
    run_network<Net, BEGIN, MIDDLE>(v);
    run_network<Net, MIDDLE, END>(v);
  }
}

template <class Net, class V>
FLCORE_INLINE void run_network(V* v) {
  run_network<Net, 0, Net::net.count>(v);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
