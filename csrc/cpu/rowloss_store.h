// Entries of a gradient from the compute type into their storage type, rounded once to nearest even;
// past the caches where whole lines are written.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// Entries from p on until a cache line begins; -1: it never does.
template <int D>
FLCORE_INLINE int64_t row_peel(const void* p) {
  const int64_t bytes = -reinterpret_cast<intptr_t>(p) & 63;
  return bytes % dtype_bytes(D) ? -1 : bytes / dtype_bytes(D);
}

// LANES values as bfloat16. NaN: the payload of a gradient's NaN has no low bits to carry upwards.
#if defined(__AVX512F__)
FLCORE_INLINE __m256i row_bf16(const vf32& x) {
  const vu32 u = (vu32)x;
  return _mm512_maskz_cvtepi32_epi16(__mmask16(0xffff),
                                     (__m512i)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16));
}
#elif defined(__AVX2__)
FLCORE_INLINE __m128i row_bf16(const vf32& x) {
  const vu32 u = (vu32)x;
  const __m256i h = (__m256i)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
#endif

template <int D, class V>
FLCORE_INLINE void row_store(void* p, int64_t i, const V& x) {
#if defined(__AVX2__)
  if constexpr (D == BF16) {
    store(static_cast<char*>(p) + 2 * i, row_bf16(x));
    return;
  }
#endif
  store_lanes<D>(p, i, x);
}

// To an aligned place, past the caches.
template <int D, class V>
FLCORE_INLINE void row_stream(void* p, int64_t i, const V& x) {
  char* at = static_cast<char*>(p) + dtype_bytes(D) * i;
  (void)at;
#if defined(__AVX512F__)
  if constexpr (D == F64)
    _mm512_stream_pd(reinterpret_cast<double*>(at), (__m512d)x);
  else if constexpr (D == F32)
    _mm512_stream_ps(reinterpret_cast<float*>(at), (__m512)x);
  else if constexpr (D == BF16)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at), row_bf16(x));
  else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at),
                        _mm512_maskz_cvtps_ph(__mmask16(0xffff), (__m512)x,
                                              _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  if constexpr (D == F64)
    _mm256_stream_pd(reinterpret_cast<double*>(at), (__m256d)x);
  else if constexpr (D == F32)
    _mm256_stream_ps(reinterpret_cast<float*>(at), (__m256)x);
  else if constexpr (D == BF16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(at), row_bf16(x));
  else
    _mm_stream_si128(reinterpret_cast<__m128i*>(at),
                     _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__x86_64__)
  if constexpr (D == F64)
    _mm_stream_pd(reinterpret_cast<double*>(at), (__m128d)x);
  else if constexpr (D == F32)
    _mm_stream_ps(reinterpret_cast<float*>(at), (__m128)x);
  else
    row_store<D>(p, i, x);
#else
  row_store<D>(p, i, x);
#endif
}

// n entries, one by one
template <int D, class T>
static inline void row_copy(void* p, int64_t i, const T* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) store1<D>(p, i + j, x[j]);
}

// Streamed stores are seen by other threads from here on.
FLCORE_INLINE void row_stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace FLCORE_ISA
}  // namespace flcore
