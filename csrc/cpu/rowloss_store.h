// Entries of a gradient from the compute type into their storage type, rounded once to nearest even;
// past the caches where whole lines are written.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowmap.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

// Entries from p on until a cache line begins; -1: it never does.
template <int D>
FLCORE_INLINE int64_t row_peel(const void* p) {
  const int64_t bytes = -reinterpret_cast<intptr_t>(p) & 63;
  return bytes % dtype_bytes(D) ? -1 : bytes / dtype_bytes(D);
}

// Rounds to bfloat16, which are the high halves then. As the processors' own instruction does it,
// numbers below 2^-126 become 0 of their sign. A NaN's payload has no low bits here that could carry upwards: it
// is that of the constant.
FLCORE_INLINE vu32 bf16_bits(const vf32& x) {
  const vu32 u = (vu32)x;
#if defined(__AVX512F__)
  const __m512i exponent = _mm512_set1_epi32(0x7f800000), last = _mm512_set1_epi32(1 << 16);
  const __mmask16 normal = _mm512_test_epi32_mask((__m512i)u, exponent);
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, last);
  const __m512i v = _mm512_mask_add_epi32((__m512i)(u & 0x80000000u), normal, (__m512i)u,
                                          _mm512_set1_epi32(0x7fff));
  return (vu32)_mm512_mask_add_epi32(v, odd & normal, v, _mm512_set1_epi32(1));
#else
  return (u & 0x7f800000u) != 0 ? u + 0x7fffu + ((u >> 16) & 1u) : u & 0x80000000u;
#endif
}

// One entry, by the same rule.
template <int D, class T>
FLCORE_INLINE void row_store(char* p, int64_t i, T x) {
  store1<D>(p, i, D == BF16 && x > T(-0x1p-126) && x < T(0x1p-126) ? x * T(0) : x);
}

#if defined(__AVX512F__)
typedef __m512i RowHalves;  // two vectors of 16-bit values
template <int D>
FLCORE_INLINE RowHalves row_halves(const vf32& a, const vf32& b) {
  if constexpr (D == BF16) {
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
    alignas(64) static constexpr uint16_t ODD[32] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16((__m512i)bf16_bits(a), load<__m512i>(ODD),
                                     (__m512i)bf16_bits(b));
#endif
  } else {
    constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT;
    const __m256i low = _mm512_maskz_cvtps_ph(__mmask16(0xffff), (__m512)a, NEAREST);
    const __m256i high = _mm512_maskz_cvtps_ph(__mmask16(0xffff), (__m512)b, NEAREST);
    return _mm512_maskz_inserti64x4(__mmask8(0xff), _mm512_castsi256_si512(low), high, 1);
  }
}
FLCORE_INLINE void stream_bytes(char* p, const __m512i& x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), x);
}
#elif defined(__AVX2__)
typedef __m256i RowHalves;
template <int D>
FLCORE_INLINE RowHalves row_halves(const vf32& a, const vf32& b) {
  if constexpr (D == BF16) {
    const __m256i both = _mm256_packus_epi32((__m256i)(bf16_bits(a) >> 16),
                                             (__m256i)(bf16_bits(b) >> 16));
    return _mm256_permute4x64_epi64(both, 0xd8);
  } else {
    const __m128i low = _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT), 1);
  }
}
FLCORE_INLINE void stream_bytes(char* p, const __m256i& x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), x);
}
#elif defined(__SSE4_1__)
typedef __m128i RowHalves;
template <int D>
FLCORE_INLINE RowHalves row_halves(const vf32& a, const vf32& b) {
  if constexpr (D == BF16) {
    return _mm_packus_epi32((__m128i)(bf16_bits(a) >> 16), (__m128i)(bf16_bits(b) >> 16));
  } else {
    uint16_t h[8];
    for (int k = 0; k < 4; ++k) h[k] = f32_to_f16(a[k]), h[4 + k] = f32_to_f16(b[k]);
    return load<__m128i>(h);
  }
}
FLCORE_INLINE void stream_bytes(char* p, const __m128i& x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), x);
}
#endif

// Two vectors from place i on; STREAM: an aligned place, past the caches.
template <int D, bool STREAM, class V>
FLCORE_INLINE void row_store_pair(void* p, int64_t i, const V& a, const V& b) {
  char* const at = static_cast<char*>(p) + dtype_bytes(D) * i;
#if defined(__SSE4_1__)
  if constexpr (D == F16 || D == BF16) {
    const RowHalves both = row_halves<D>(a, b);
    if constexpr (STREAM)
      stream_bytes(at, both);
    else
      store(at, both);
  } else if constexpr (STREAM) {
    stream_bytes(at, (RowHalves)a);
    stream_bytes(at + VEC_BYTES, (RowHalves)b);
  } else {
    store(at, a);
    store(at + VEC_BYTES, b);
  }
#else
  store_lanes<D>(at, 0, a);
  store_lanes<D>(at, Real<V>::WIDTH, b);
#endif
}

// Streamed stores are seen by other threads from here on.
FLCORE_INLINE void row_stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Writes factor * values to n entries of a gradient, in pieces: some up to a cache line, whole
// groups, the rest; and the target's entry in its place (a line that is written past the caches and
// then once more comes back from memory first).
template <int D>
struct RowWriter {
  typedef typename RowCompute<D>::Number T;
  typedef typename RowCompute<D>::Vector V;
  static constexpr int WIDTH = Real<V>::WIDTH, GROUP = ROW_GROUP<T>;
  const T* values;
  T factor;
  char* grad;
  int64_t n, at;
  int64_t peel;  // entries before the first cache line
  bool stream;
  int64_t hole;  // place of the target, or -1
  T own;         // and its entry

  void start(const T* from, T by, char* to, int64_t count, bool past_caches, int64_t target,
             T entry) {
    values = from, factor = by, grad = to, n = count, at = 0, hole = target, own = entry;
    peel = past_caches ? row_peel<D>(grad) : -1;
    stream = peel >= 0;
    if (peel > n) peel = n;
  }
  // less than a group
  FLCORE_NOINLINE void some(int64_t end) {
    const V by = splat<V>(factor);
    const int64_t from = at;
    for (; at + 2 * WIDTH <= end; at += 2 * WIDTH)
      row_store_pair<D, false>(grad, at, load<V>(values + at) * by,
                               load<V>(values + at + WIDTH) * by);
    for (; at < end; ++at) row_store<D>(grad, at, values[at] * factor);
    if (hole >= from && hole < end) row_store<D>(grad, hole, own);
  }
  template <bool STREAM>
  FLCORE_MEMBER void put(const T* x, const V& by) {
    unroll<GROUP / WIDTH / 2>([&](auto i) FLCORE_LAMBDA {
      const int64_t k = i.value * 2 * WIDTH;
      row_store_pair<D, STREAM>(grad, at + k, load<V>(x + k) * by, load<V>(x + k + WIDTH) * by);
    });
  }
  FLCORE_NOINLINE void group_with_hole() {
    T x[GROUP];
    for (int j = 0; j < GROUP; ++j) x[j] = values[at + j] * factor;
    x[hole - at] = own;
    if (stream)
      put<true>(x, splat<V>(1));
    else
      put<false>(x, splat<V>(1));
  }
  // The entries below `end`, and less than a group beyond.
  FLCORE_MEMBER void until(int64_t end) {
    if (peel > 0 && end > 0) {
      some(peel);
      peel = 0;
    }
    while (at < end && at < n) {
      if (at + GROUP > n) {
        some(n);
        return;
      }
      if (uint64_t(hole - at) < uint64_t(GROUP))
        group_with_hole();
      else if (stream)
        put<true>(values + at, splat<V>(factor));
      else
        put<false>(values + at, splat<V>(factor));
      at += GROUP;
    }
  }
  FLCORE_NOINLINE void finish() { until(n); }
};

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
