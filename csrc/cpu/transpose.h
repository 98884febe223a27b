// A block of short rows turned so that lane r of vector k is element k of row r, and back. Rows are
// read and written 4 elements (2 of float64) at a time and never beyond their ends: what is left
// over is taken from the last 4 of the row. Values are not changed but for the conversion of type.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

typedef float Quad __attribute__((vector_size(16)));
typedef double Pair __attribute__((vector_size(16)));
typedef uint32_t QuadBits __attribute__((vector_size(16)));

template <class V>
struct Piece;  // what is turned at once: 16 bytes
template <>
struct Piece<vf32> {
  typedef Quad type;
  static constexpr int SIZE = 4, PARTS = LANES / 4;
};
template <>
struct Piece<vf64> {
  typedef Pair type;
  static constexpr int SIZE = 2, PARTS = LANES64 / 2;
};

// ---- one piece of a row -------------------------------------------------------------------------

template <int D>
FLCORE_INLINE auto load_piece(const char* at) {
  if constexpr (D == F64) {
    return load<Pair>(at);
  } else if constexpr (D == F32) {
    return load<Quad>(at);
#if defined(__x86_64__)
  } else if constexpr (D == BF16) {
    const __m128i u = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
    return (Quad)((QuadBits)u << 16);
#endif
#if defined(__F16C__)
  } else if constexpr (D == F16) {
    return (Quad)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
#endif
  } else {
    return Quad{load1<D>(at, 0), load1<D>(at, 1), load1<D>(at, 2), load1<D>(at, 3)};
  }
}

FLCORE_INLINE void store_piece(char* at, const Pair& x) { store(at, x); }

// bfloat16 in the upper halves of x: to nearest even, a NaN stays one
FLCORE_INLINE vf32 round_bf16(const vf32& x) {
  const vu32 u = (vu32)x;
  return (vf32)(x == x ? u + 0x7fffu + ((u >> 16) & 1u) : u | 0x400000u);
}

// x as round_piece left it
template <int D>
FLCORE_INLINE void store_piece(char* at, const Quad& x) {
  if constexpr (D == F32) {
    store(at, x);
#if defined(__x86_64__)
  } else if constexpr (D == BF16) {
    const __m128i u = (__m128i)((QuadBits)x >> 16);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packus_epi32(u, u));
#endif
#if defined(__F16C__)
  } else if constexpr (D == F16) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at),
                     _mm_cvtps_ph((__m128)x, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int k = 0; k < 4; ++k) store1<D>(at, k, x[k]);
  }
}
template <int D>
FLCORE_INLINE void store_piece(char* at, const Pair& x) {
  store(at, x);
}

// ---- pieces of a vector -------------------------------------------------------------------------

#if defined(__AVX512F__)
FLCORE_INLINE vf32 join(const Quad* p) {
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)p[0]), (__m128)p[1], 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)p[2]), (__m128)p[3], 1);
  return (vf32)_mm512_maskz_insertf32x8(0xffff, _mm512_castps256_ps512(low), high, 1);
}
template <int L>
FLCORE_INLINE Quad part(const vf32& v) {
  return (Quad)_mm512_maskz_extractf32x4_ps(0xf, (__m512)v, L);
}
#elif defined(__AVX2__)
FLCORE_INLINE vf32 join(const Quad* p) {
  return (vf32)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)p[0]), (__m128)p[1], 1);
}
template <int L>
FLCORE_INLINE Quad part(const vf32& v) {
  return (Quad)_mm256_extractf128_ps((__m256)v, L);
}
#else
FLCORE_INLINE vf32 join(const Quad* p) { return (vf32)p[0]; }
template <int L>
FLCORE_INLINE Quad part(const vf32& v) {
  return (Quad)v;
}
#endif
FLCORE_INLINE vf64 join(const Pair* p) { return (vf64)join(reinterpret_cast<const Quad*>(p)); }
template <int L>
FLCORE_INLINE Pair part(const vf64& v) {
  return (Pair)part<L>((vf32)v);
}

// ---- squares within 16 bytes: lane j of q[c] and lane c of q[j] change places -------------------

#if defined(__AVX512F__)
#define FLCORE_UNPACK(half, type, a, b) \
  (vf32) _mm512_maskz_unpack##half##_##type(FLCORE_ALL_##type, (__m512_##type)a, (__m512_##type)b)
#define FLCORE_ALL_ps 0xffff
#define FLCORE_ALL_pd 0xff
typedef __m512 __m512_ps;
typedef __m512d __m512_pd;
#elif defined(__AVX2__)
#define FLCORE_UNPACK(half, type, a, b) \
  (vf32) _mm256_unpack##half##_##type((FLCORE_REG_##type)a, (FLCORE_REG_##type)b)
#define FLCORE_REG_ps __m256
#define FLCORE_REG_pd __m256d
#elif defined(__x86_64__)
#define FLCORE_UNPACK(half, type, a, b) \
  (vf32) _mm_unpack##half##_##type((FLCORE_REG_##type)a, (FLCORE_REG_##type)b)
#define FLCORE_REG_ps __m128
#define FLCORE_REG_pd __m128d
#endif

FLCORE_INLINE void turn(vf32* q) {
#if defined(__x86_64__)
  const vf32 a = FLCORE_UNPACK(lo, ps, q[0], q[1]), b = FLCORE_UNPACK(lo, ps, q[2], q[3]);
  const vf32 c = FLCORE_UNPACK(hi, ps, q[0], q[1]), d = FLCORE_UNPACK(hi, ps, q[2], q[3]);
  q[0] = FLCORE_UNPACK(lo, pd, a, b);
  q[1] = FLCORE_UNPACK(hi, pd, a, b);
  q[2] = FLCORE_UNPACK(lo, pd, c, d);
  q[3] = FLCORE_UNPACK(hi, pd, c, d);
#else
  const vf32 a = q[0], b = q[1], c = q[2], d = q[3];
  for (int j = 0; j < 4; ++j) q[j] = vf32{a[j], b[j], c[j], d[j]};
#endif
}
FLCORE_INLINE void turn(vf64* q) {
#if defined(__x86_64__)
  const vf32 a = (vf32)q[0], b = (vf32)q[1];
  q[0] = (vf64)FLCORE_UNPACK(lo, pd, a, b);
  q[1] = (vf64)FLCORE_UNPACK(hi, pd, a, b);
#else
  const vf64 a = q[0], b = q[1];
  for (int j = 0; j < 2; ++j) q[j] = vf64{a[j], b[j]};
#endif
}

// ---- rows of a block ----------------------------------------------------------------------------

// Where rows begin: each at a place of its own, or one after the other at a distance in bytes;
// at(offset) is what finds them that many bytes further on.
template <class Char>
struct PlacedRows {
  Char* const* row;
  int64_t offset;
  FLCORE_MEMBER PlacedRows at(int64_t by) const { return {row, offset + by}; }
  FLCORE_MEMBER Char* operator()(int r) const { return row[r] + offset; }
};
template <class Char>
struct EvenRows {
  Char* group[LANES / 4];  // every fourth row
  int64_t step, step3;
  FLCORE_MEMBER EvenRows(Char* first, int64_t bytes) : step(bytes), step3(3 * bytes) {
    for (int i = 0; i < LANES / 4; ++i) group[i] = first + i * (4 * step);
  }
  FLCORE_MEMBER EvenRows at(int64_t by) const {
    EvenRows rows(group[0] + by, step);
#if defined(__GNUC__)
    // four registers a block: without this the addresses of all rows are kept, most in memory
    for (int i = 0; i < LANES / 4; ++i) __asm__("" : "+r"(rows.group[i]));
#endif
    return rows;
  }
  FLCORE_MEMBER Char* operator()(int r) const {
    return group[r / 4] + (r % 4 == 3 ? step3 : r % 4 * step);
  }
};

// v[j] = lanes of element k + j, j < SIZE, of the rows
template <int D, class V, class Rows>
FLCORE_INLINE void load_turned(const Rows& rows, int64_t k, V* v) {
  typedef Piece<V> P;
  const Rows at = rows.at(k * dtype_bytes(D));
  unroll<P::SIZE>([&](auto j) FLCORE_LAMBDA {
    typename P::type p[P::PARTS];
    unroll<P::PARTS>([&](auto l) FLCORE_LAMBDA {
      p[decltype(l)::value] = load_piece<D>(at(decltype(l)::value * P::SIZE + decltype(j)::value));
    });
    v[decltype(j)::value] = join(p);
  });
  turn(v);
}

// The other way, `count` of the rows; v is used up.
template <int D, class V, class Rows>
FLCORE_INLINE void store_turned(const Rows& rows, int count, int64_t k, V* v) {
  typedef Piece<V> P;
  const Rows at = rows.at(k * dtype_bytes(D));
  if constexpr (D == BF16)
    for (int j = 0; j < P::SIZE; ++j) v[j] = round_bf16(v[j]);
  turn(v);
  unroll<P::PARTS>([&](auto l) FLCORE_LAMBDA {
    unroll<P::SIZE>([&](auto j) FLCORE_LAMBDA {
      constexpr int R = decltype(l)::value * P::SIZE + decltype(j)::value;
      if (R < count) store_piece<D>(at(R), part<decltype(l)::value>(v[decltype(j)::value]));
    });
  });
}

template <int D>
struct TurnedVector {
  typedef vf32 type;
  typedef float number;
};
template <>
struct TurnedVector<F64> {
  typedef vf64 type;
  typedef double number;
};

// v[0 .. count - 1] = lanes of elements k .. of the rows, as many as lanes
template <int D, class Rows>
FLCORE_INLINE void load_rows(const Rows& rows, int64_t k, int count,
                             typename TurnedVector<D>::type* v) {
  typedef typename TurnedVector<D>::type V;
  constexpr int SIZE = Piece<V>::SIZE, WIDTH = SIZE * Piece<V>::PARTS;
  int j = 0;
  for (; j + SIZE <= count; j += SIZE) load_turned<D>(rows, k + j, v + j);
  if (j == count) return;
  if (k + count >= SIZE) {
    V last[SIZE];
    load_turned<D>(rows, k + count - SIZE, last);
    for (; j < count; ++j) v[j] = last[SIZE - count + j];
    return;
  }
  for (; j < count; ++j) {
    typename TurnedVector<D>::number x[WIDTH];
    for (int r = 0; r < WIDTH; ++r) {
      if constexpr (D == F64)
        x[r] = load1_f64<D>(rows(r), k + j);
      else
        x[r] = load1<D>(rows(r), k + j);
    }
    v[j] = load<V>(x);
  }
}

// Elements k .. k + count - 1 of the first n rows
template <int D, class Rows>
FLCORE_INLINE void store_rows(const Rows& rows, int n, int64_t k, int count,
                              const typename TurnedVector<D>::type* from) {
  typedef typename TurnedVector<D>::type V;
  constexpr int SIZE = Piece<V>::SIZE, WIDTH = SIZE * Piece<V>::PARTS;
  V v[SIZE];
  int j = 0;
  const auto block = [&](int first) FLCORE_LAMBDA {
    for (int i = 0; i < SIZE; ++i) v[i] = from[first + i];
    if (n == WIDTH)  // without a test a row
      store_turned<D>(rows, WIDTH, k + first, v);
    else
      store_turned<D>(rows, n, k + first, v);
  };
  for (; j + SIZE <= count; j += SIZE) block(j);
  if (j == count) return;
  if (count >= SIZE) return block(count - SIZE);
  for (; j < count; ++j) {
    typename TurnedVector<D>::number x[WIDTH];
    store(x, from[j]);
    for (int r = 0; r < n; ++r) store1<D>(rows(r), k + j, x[r]);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
