// The randomised Hadamard transform of one block of m = 2^k values, m <= 4096: signs from a Philox
// stream, and the Walsh-Hadamard transform in place, not normalised.
//   stages h = 1, 2, 4 .. m / 2 in this order, each (a, b) -> (a + b, a - b) for places i and i + h
// Every output is a fixed tree of additions, so neither vector width nor the number of stages that
// one pass holds in registers changes a bit. A block lives in L1; 256 values (64 below AVX-512) go
// through all their stages in registers, the next pass takes 3 or 4 stages at once.
// int32 values are transformed exactly.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/philox_bits.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t HADAMARD_MAX = 4096;
#if defined(__AVX512F__)
constexpr int HADAMARD_VECTORS = 16;  // held in registers by one pass
#else
constexpr int HADAMARD_VECTORS = 8;
#endif
constexpr int64_t HADAMARD_RUN = LANES * HADAMARD_VECTORS;

template <class T>
struct HadamardVector {
  typedef vf32 type;
};
template <>
struct HadamardVector<int32_t> {
  typedef vi32 type;
};

// Lanes with i & H set hold the second value of a pair: t - v there, v + t elsewhere, where t holds
// the partner of each lane.
template <int H, class V>
FLCORE_INLINE V hadamard_partner(const V& v) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)v;
  if constexpr (H == 1) return (V)_mm512_maskz_shuffle_ps(0xffff, x, x, 0xb1);
  if constexpr (H == 2) return (V)_mm512_maskz_shuffle_ps(0xffff, x, x, 0x4e);
  if constexpr (H == 4) return (V)_mm512_maskz_shuffle_f32x4(0xffff, x, x, 0xb1);
  if constexpr (H == 8) return (V)_mm512_maskz_shuffle_f32x4(0xffff, x, x, 0x4e);
#elif defined(__AVX2__)
  const __m256 x = (__m256)v;
  if constexpr (H == 1) return (V)_mm256_permute_ps(x, 0xb1);
  if constexpr (H == 2) return (V)_mm256_permute_ps(x, 0x4e);
  if constexpr (H == 4) return (V)_mm256_permute2f128_ps(x, x, 1);
#elif defined(__x86_64__)
  const __m128 x = (__m128)v;
  if constexpr (H == 1) return (V)_mm_shuffle_ps(x, x, 0xb1);
  if constexpr (H == 2) return (V)_mm_shuffle_ps(x, x, 0x4e);
#else
  V t;
  for (int k = 0; k < LANES; ++k) t[k] = v[k ^ H];
  return t;
#endif
}

template <int H>
FLCORE_INLINE vf32 hadamard_lanes(const vf32& v) {
  const vf32 t = hadamard_partner<H>(v);
#if defined(__AVX512F__)
  constexpr __mmask16 SECOND = H == 1 ? 0xaaaa : H == 2 ? 0xcccc : H == 4 ? 0xf0f0 : 0xff00;
  return (vf32)_mm512_mask_sub_ps((__m512)(v + t), SECOND, (__m512)t, (__m512)v);
#else
  vu32 negative;
  for (int k = 0; k < LANES; ++k) negative[k] = k & H ? 0x80000000u : 0u;
  return t + (vf32)((vu32)v ^ negative);
#endif
}

template <int H>
FLCORE_INLINE vi32 hadamard_lanes(const vi32& v) {
  vi32 second;
  for (int k = 0; k < LANES; ++k) second[k] = k & H ? -1 : 0;
  return hadamard_partner<H>(v) + ((v ^ second) - second);
}

// Stages among R vectors.
template <int R, class V>
FLCORE_INLINE void hadamard_vectors(V (&v)[R]) {
#pragma GCC unroll 4
  for (int h = 1; h < R; h *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      if (i & h) continue;
      const V a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

// The first stages of HADAMARD_RUN values that `get` supplies: get(Const<k>()) is vector k.
template <class T, class Get>
FLCORE_INLINE void hadamard_first(T* x, const Get& get) {
  typedef typename HadamardVector<T>::type V;
  V v[HADAMARD_VECTORS];
  unroll<HADAMARD_VECTORS>([&](auto k) FLCORE_LAMBDA {
    V a = get(k);
    a = hadamard_lanes<1>(a);
    a = hadamard_lanes<2>(a);
    if constexpr (LANES > 4) a = hadamard_lanes<4>(a);
    if constexpr (LANES > 8) a = hadamard_lanes<8>(a);
    v[decltype(k)::value] = a;
  });
  hadamard_vectors(v);
  unroll<HADAMARD_VECTORS>([&](auto k) FLCORE_LAMBDA {
    store(x + LANES * decltype(k)::value, v[decltype(k)::value]);
  });
}

// Stages h .. h R / 2 of all values.
template <int R, class T>
static void hadamard_next(T* x, int64_t m, int64_t h) {
  typedef typename HadamardVector<T>::type V;
  for (int64_t group = 0; group < m; group += h * R)
    for (int64_t i = group; i < group + h; i += LANES) {
      V v[R];
#pragma GCC unroll 16
      for (int k = 0; k < R; ++k) v[k] = load<V>(x + i + k * h);
      hadamard_vectors(v);
#pragma GCC unroll 16
      for (int k = 0; k < R; ++k) store(x + i + k * h, v[k]);
    }
}

// The stages after hadamard_first; m is at least HADAMARD_RUN.
template <class T>
FLCORE_INLINE void hadamard_rest(T* x, int64_t m) {
  for (int64_t h = HADAMARD_RUN; h < m;) {
    const int64_t left = m / h;
    if (left >= HADAMARD_VECTORS) {
      hadamard_next<HADAMARD_VECTORS>(x, m, h);
      h *= HADAMARD_VECTORS;
    } else if (left >= 8) {
      hadamard_next<8>(x, m, h);
      h *= 8;
    } else if (left >= 4) {
      hadamard_next<4>(x, m, h);
      h *= 4;
    } else {
      hadamard_next<2>(x, m, h);
      h *= 2;
    }
  }
}

template <class T>
static void hadamard_small(T* x, int64_t m) {
  for (int64_t h = 1; h < m; h *= 2)
    for (int64_t group = 0; group < m; group += 2 * h)
      for (int64_t i = group; i < group + h; ++i) {
        const T a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
}

template <class T>
static void hadamard(T* x, int64_t m) {
  typedef typename HadamardVector<T>::type V;
  if (m < HADAMARD_RUN) {
    hadamard_small(x, m);
    return;
  }
  for (int64_t i = 0; i < m; i += HADAMARD_RUN)
    hadamard_first(x + i, [&](auto k) FLCORE_LAMBDA {
      return load<V>(x + i + LANES * decltype(k)::value);
    });
  hadamard_rest(x, m);
}

FLCORE_INLINE int64_t hadamard_size(int64_t n) {  // the next power of two
  return n <= 1 ? 1 : int64_t(1) << (64 - __builtin_clzll(uint64_t(n - 1)));
}

// m^-1/2, which is exact for even k and the float32 next to it otherwise; the same bits everywhere
FLCORE_INLINE float hadamard_norm(int64_t m) {
  const int k = 63 - __builtin_clzll(uint64_t(m));
  return float_of(uint32_t(127 - (k + 1) / 2) << 23) * (k & 1 ? 0x1.6a09e6p0f : 1.0f);
}

// ---- signs -------------------------------------------------------------------------------------

// Coordinate i takes bit i & 31 of element i >> 5 of the stream, 1 = minus.
struct HadamardSigns {
  uint32_t w[HADAMARD_MAX / 32];

  // signs of coordinates [first, first + m); first is a multiple of 32
  FLCORE_MEMBER void make(const PhiloxStream& s, int64_t first, int64_t m) {
    philox_fill<PhiloxRaw>(s, first >> 5, (m + 31) >> 5, w);
  }
  FLCORE_MEMBER float one(int64_t i, float x) const {
    return float_of(bits_of(x) ^ ((w[i >> 5] >> (i & 31)) << 31));
  }
  FLCORE_MEMBER vf32 many(int64_t i, const vf32& x) const {
    const uint32_t bits = w[i >> 5] >> (i & 31);
#if defined(__AVX512F__)
    return (vf32)_mm512_mask_xor_epi32((__m512i)x, __mmask16(bits), (__m512i)x,
                                       _mm512_set1_epi32(int(0x80000000u)));
#else
    vu32 lane;
    for (int k = 0; k < LANES; ++k) lane[k] = 1u << k;
    return (vf32)((vu32)x ^ ((vu32)(((vu32{} + bits) & lane) != 0) & 0x80000000u));
#endif
  }
};

// ---- 16 lanes: place i belongs to lane i % 16, lanes are added in a fixed tree ------------------

struct LaneSums {
  vf32 v[16 / LANES];

  FLCORE_MEMBER float total() const {
    float a[16];
    for (int k = 0; k < 16 / LANES; ++k) store(a + k * LANES, v[k]);
    return tree(a);
  }
  static FLCORE_MEMBER float tree(float (&a)[16]) {
    for (int s = 8; s > 0; s /= 2)
      for (int k = 0; k < s; ++k) a[k] += a[k + s];
    return a[0];
  }
};

}  // namespace FLCORE_ISA
}  // namespace flcore
