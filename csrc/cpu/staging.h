// Rows on their way to a kernel that wants whole vectors of the working type: converted, mixed by a
// matrix, or shorter than a vector.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t AHEAD = 1024;  // bytes ahead of the reads, asked for into L2: L1 is too small

template <class T>
struct VectorOf {
  typedef vf32 type;
};
template <>
struct VectorOf<double> {
  typedef vf64 type;
};

template <int D>
FLCORE_INLINE vf32 load_as(const void* x, int64_t i, const vf32*) {
  return load_f32<D>(x, i);
}
template <int D>
FLCORE_INLINE vf64 load_as(const void* x, int64_t i, const vf64*) {
  return load_f64<D>(x, i);
}
template <int D, class T>
FLCORE_INLINE T load1_as(const void* x, int64_t i) {
  if constexpr (sizeof(T) == 8)
    return load1_f64<D>(x, i);
  else
    return load1<D>(x, i);
}

// Values offset .. offset + m - 1 of a row, in the working type; padded with zeros to whole
// vectors.
template <int D, class T>
static void stage_row(const void* x, int64_t offset, int64_t m, T* to) {
  typedef typename VectorOf<T>::type V;
  constexpr int64_t WIDTH = int64_t(sizeof(V) / sizeof(T));
  int64_t i = 0;
  for (; i + WIDTH <= m; i += WIDTH) {
    __builtin_prefetch(static_cast<const char*>(x) + dtype_bytes(D) * (offset + i) + AHEAD, 0, 2);
    store(to + i, load_as<D>(x, offset + i, static_cast<const V*>(nullptr)));
  }
  for (; i < m; ++i) to[i] = load1_as<D, T>(x, offset + i);
  for (; i % WIDTH; ++i) to[i] = 0;
}

// Mixed row r from staged rows, m coordinates of whole vectors; a product and a sum at a time, in
// the order of the entries.
template <int BLOCK, class T>
static void mix_row(const SelectArgs& a, int64_t r, const T* rows, int64_t stride, int64_t m,
                    T* to) {
  typedef typename VectorOf<T>::type V;
  constexpr int64_t WIDTH = int64_t(sizeof(V) / sizeof(T));
  const int64_t first = a.mix_starts[r], last = a.mix_starts[r + 1];
  int64_t i = 0;
  for (; i + BLOCK * WIDTH <= m; i += BLOCK * WIDTH) {
    V sum[BLOCK] = {};
    for (int64_t e = first; e < last; ++e) {
      const T* x = rows + a.mix_rows[e] * stride + i;
      const T w = T(a.mix_values[e]);
      unroll<BLOCK>([&](auto k) FLCORE_LAMBDA {
        sum[k.value] = sum[k.value] + w * load<V>(x + k.value * WIDTH);
      });
    }
    unroll<BLOCK>([&](auto k) FLCORE_LAMBDA { store(to + i + k.value * WIDTH, sum[k.value]); });
  }
  if constexpr (BLOCK > 1) {
    if (i < m) mix_row<1>(a, r, rows + i, stride, m - i, to + i);
  }
}

// min and max lose NaN: puts it back where a value of the coordinate is one
template <class T>
static void restore_nan(const char* const* p, int64_t n, int64_t m, T* out) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t r = 0; r < n; ++r) {
      T x;
      __builtin_memcpy(&x, p[r] + int64_t(sizeof(T)) * i, sizeof(T));
      if (x != x) out[i] = x + x;
    }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
