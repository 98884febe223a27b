// Where the logits of a group of rows lie, which of the rows count, and their targets, a lane of a
// vector for each row; used by rowloss_columns.h.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowloss_finish.h"
#include "cpu/rowmap.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int COLUMNS = 64;  // classes held at once

// ---- vectors of per-row numbers -----------------------------------------------------------------

// n entries of an array from `first`, the other lanes `fill`
template <class V, class T>
FLCORE_INLINE V some_lanes(const void* p, int64_t first, int n, T fill) {
  constexpr int WIDTH = int(sizeof(V) / sizeof(T));
  const T* from = static_cast<const T*>(p) + first;
  if (n == WIDTH) return load<V>(from);
  T x[WIDTH];
  for (int r = 0; r < WIDTH; ++r) x[r] = r < n ? from[r] : fill;
  return load<V>(x);
}
template <class V>
FLCORE_INLINE void put_lanes(void* p, int64_t first, int n, const V& v) {
  typedef typename Real<V>::T T;
  if (!p) return;
  T* to = static_cast<T*>(p) + first;
  if (n == Real<V>::WIDTH) return store(to, v);
  T x[Real<V>::WIDTH];
  store(x, v);
  for (int r = 0; r < n; ++r) to[r] = x[r];
}

// Of a vector of rows: `keep` those that count; `target` the class here, or -1.
template <class V>
struct ColumnTargets {
  typename Real<V>::I keep, target;
};

template <class V>
FLCORE_INLINE ColumnTargets<V> column_targets(const RowLossArgs& a, int64_t first, int n) {
  typedef typename Real<V>::I I;
  typedef typename Real<V>::T T;
  constexpr int WIDTH = Real<V>::WIDTH;
  if (n == WIDTH && a.labels && !a.valid && a.label_offset == 0 && sizeof(T) == 4) {
    const int32_t classes = int32_t(a.classes);
    if (a.label_bytes == 4) {
      const I y = load<I>(static_cast<const int32_t*>(a.labels) + first);
      const bool can = a.ignore_index == int32_t(a.ignore_index);
      const I keep = can ? y != int32_t(a.ignore_index) : (I{} == 0);
      return {keep, keep & (y >= 0) & (y < classes) ? y : I{} - 1};
    }
    typedef int32_t Half __attribute__((vector_size(VEC_BYTES / 2)));
    Half y[2], keep[2];
    for (int h = 0; h < 2; ++h) {
      const vi64 l = load<vi64>(static_cast<const int64_t*>(a.labels) + first + h * LANES64);
      const vi64 counts = l != a.ignore_index;
      y[h] = __builtin_convertvector(counts & (l >= 0) & (l < a.classes) ? l : vi64{} - 1, Half);
      keep[h] = __builtin_convertvector(counts, Half);
    }
    return {load<I>(keep), load<I>(y)};
  }
  I keep = {}, y = {};
  for (int r = 0; r < WIDTH; ++r) {
    const RowAccess<sizeof(T) == 8 ? F64 : F32> at(a);
    const bool counts = r < n && at.counts(first + r);
    keep[r] = counts ? -1 : 0;
    y[r] = counts ? at.target(first + r) : -1;
  }
  return {keep, y};
}

// ---- where the logits of a group of rows lie ----------------------------------------------------

// Rows first .. first + n - 1. `start` is where each begins.
template <class Char>
struct ColumnPlace {
  Char* start[LANES];
  int64_t class_stride;
  bool beside;  // row after row lies side by side
};

template <int D, class Char>
FLCORE_INLINE void place_rows(Char* base, int64_t inner, int64_t outer_stride, int64_t row_stride,
                              int64_t class_stride, int64_t first, int n, int width,
                              ColumnPlace<Char>& p) {
  constexpr int64_t BYTES = dtype_bytes(D);
  int64_t outer = first / inner, within = first % inner;
  Char* const begin = base + (outer * outer_stride + within * row_stride) * BYTES;
  Char* at = begin;
  p.class_stride = class_stride;
  p.beside = row_stride == 1 && within + n <= inner;
  for (int r = 0; r < width; ++r) {
    p.start[r] = r < n ? at : begin;
    at += row_stride * BYTES;
    if (++within == inner) {
      within = 0;
      at = base + ++outer * outer_stride * BYTES;
    }
  }
}

// v[j] = logits k + j of the rows
template <int D>
static void read_columns(const ColumnPlace<const char>& p, int n, int64_t k, int count,
                         typename RowCompute<D>::Vector* v) {
  typedef typename RowCompute<D>::Vector V;
  typedef typename RowCompute<D>::Number T;
  constexpr int WIDTH = Real<V>::WIDTH;
  if (p.class_stride == 1) return load_rows<D>(p.start, k, count, v);
  const int64_t step = p.class_stride * dtype_bytes(D);
  if (p.beside && n == WIDTH) {
    const char* at = p.start[0] + k * step;
    for (int j = 0; j < count; ++j, at += step) {
      if constexpr (D == F64)
        v[j] = load_f64<D>(at, 0);
      else
        v[j] = load_f32<D>(at, 0);
    }
    return;
  }
  for (int j = 0; j < count; ++j) {
    T x[WIDTH];
    for (int r = 0; r < WIDTH; ++r) x[r] = T(load1_f64<D>(p.start[r] + (k + j) * step, 0));
    v[j] = load<V>(x);
  }
}

template <int D>
static void write_columns(const ColumnPlace<char>& p, int n, int64_t k, int count,
                          const typename RowCompute<D>::Vector* v) {
  typedef typename RowCompute<D>::Vector V;
  typedef typename RowCompute<D>::Number T;
  constexpr int WIDTH = Real<V>::WIDTH;
  if (p.class_stride == 1) return store_rows<D>(p.start, n, k, count, v);
  const int64_t step = p.class_stride * dtype_bytes(D);
  if (p.beside && n == WIDTH) {
    char* at = p.start[0] + k * step;
    for (int j = 0; j < count; ++j, at += step) {
      if constexpr (D == BF16)
        store(at, __builtin_convertvector((vu32)round_bf16(v[j]) >> 16, vu16h));
      else
        store_lanes<D>(at, 0, v[j]);
    }
    return;
  }
  for (int j = 0; j < count; ++j) {
    T x[WIDTH];
    store(x, v[j]);
    for (int r = 0; r < n; ++r) store1<D>(p.start[r] + (k + j) * step, 0, x[r]);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore

