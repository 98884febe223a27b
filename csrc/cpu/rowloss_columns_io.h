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
namespace {

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
      return {keep, (keep & (y >= 0) & (y < classes)) ? y : I{} - 1};
    }
    typedef int32_t Half __attribute__((vector_size(VEC_BYTES / 2)));
    Half y[2], keep[2];
    for (int h = 0; h < 2; ++h) {
      const vi64 l = load<vi64>(static_cast<const int64_t*>(a.labels) + first + h * LANES64);
      const vi64 counts = l != a.ignore_index;
      y[h] = __builtin_convertvector((counts & (l >= 0) & (l < a.classes)) ? l : vi64{} - 1, Half);
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

// Rows of one group: where the first one begins, and all of them unless they are `even`.
template <class Char>
struct ColumnPlace {
  Char *first, *start[LANES];
  int64_t class_stride, row_bytes;
  bool beside;  // row after row lies side by side
  bool even;    // all lanes have a row, row_bytes apart
  FLCORE_MEMBER Char* row(int r) const { return even ? first + r * row_bytes : start[r]; }
};

// Element (i, k) of an array, as RowLossArgs tells it.
template <class Char>
struct ColumnArray {
  Char* base;
  int64_t bytes, inner, outer_stride, row_stride, class_stride;
};
FLCORE_INLINE ColumnArray<const char> logits_of(const RowLossArgs& a) {
  return {static_cast<const char*>(a.x), dtype_bytes(a.dtype), a.inner,
          a.outer_stride,                a.row_stride,         a.class_stride};
}
FLCORE_INLINE ColumnArray<const char> soft_of(const RowLossArgs& a) {
  return {static_cast<const char*>(a.soft), dtype_bytes(a.dtype), a.rows, 0, a.classes, 1};
}
FLCORE_INLINE ColumnArray<char> gradient_of(const RowLossArgs& a) {
  return {static_cast<char*>(a.grad), dtype_bytes(a.dtype), a.inner,
          a.grad_outer_stride,        a.grad_row_stride,    a.grad_class_stride};
}

template <class Char>
FLCORE_INLINE void place_rows(const ColumnArray<Char>& array, int64_t first, int n, int width,
                              ColumnPlace<Char>& p) {
  const int64_t inner = array.inner, bytes = array.bytes;
  int64_t outer = 0, within = first;
  if (first >= inner) outer = first / inner, within = first % inner;
  Char* at = array.base + (outer * array.outer_stride + within * array.row_stride) * bytes;
  p.first = at;
  p.class_stride = array.class_stride;
  p.row_bytes = array.row_stride * bytes;
  p.beside = array.row_stride == 1 && within + n <= inner;
  p.even = n == width && within + n <= inner;
  if (p.even) return;
  for (int r = 0; r < width; ++r) {
    p.start[r] = r < n ? at : p.first;
    at += p.row_bytes;
    if (++within == inner) {
      within = 0;
      at = array.base + ++outer * array.outer_stride * bytes;
    }
  }
}

// v[j] = logits k + j of the rows
template <int D>
FLCORE_NOINLINE static void read_columns(const ColumnPlace<const char>& p, int n, int64_t k,
                                         int count, typename RowCompute<D>::Vector* v) {
  typedef typename RowCompute<D>::Vector V;
  typedef typename RowCompute<D>::Number T;
  constexpr int WIDTH = Real<V>::WIDTH;
  if (p.class_stride == 1 && p.even)
    return load_rows<D>(EvenRows<const char>(p.first, p.row_bytes), k, count, v);
  if (p.class_stride == 1) return load_rows<D>(PlacedRows<const char>{p.start, 0}, k, count, v);
  const int64_t step = p.class_stride * dtype_bytes(D);
  if (p.beside && n == WIDTH) {
    const char* at = p.first + k * step;
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
    for (int r = 0; r < WIDTH; ++r) x[r] = T(load1_f64<D>(p.row(r) + (k + j) * step, 0));
    v[j] = load<V>(x);
  }
}

template <int D>
FLCORE_NOINLINE static void write_columns(const ColumnPlace<char>& p, int n, int64_t k, int count,
                                          const typename RowCompute<D>::Vector* v) {
  typedef typename RowCompute<D>::Vector V;
  typedef typename RowCompute<D>::Number T;
  constexpr int WIDTH = Real<V>::WIDTH;
  if (p.class_stride == 1 && p.even)
    return store_rows<D>(EvenRows<char>(p.first, p.row_bytes), n, k, count, v);
  if (p.class_stride == 1) return store_rows<D>(PlacedRows<char>{p.start, 0}, n, k, count, v);
  const int64_t step = p.class_stride * dtype_bytes(D);
  if (p.beside && n == WIDTH) {
    char* at = p.first + k * step;
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
    for (int r = 0; r < n; ++r) store1<D>(p.row(r) + (k + j) * step, 0, x[r]);
  }
}

// The same for a storage type known when it runs: float64 for V of float64, else the others.
FLCORE_INLINE void read_columns(int dtype, const ColumnPlace<const char>& p, int n, int64_t k,
                                int count, vf32* v) {
  if (dtype == F32) return read_columns<F32>(p, n, k, count, v);
  if (dtype == BF16) return read_columns<BF16>(p, n, k, count, v);
  read_columns<F16>(p, n, k, count, v);
}
FLCORE_INLINE void read_columns(int, const ColumnPlace<const char>& p, int n, int64_t k, int count,
                                vf64* v) {
  read_columns<F64>(p, n, k, count, v);
}
FLCORE_INLINE void write_columns(int dtype, const ColumnPlace<char>& p, int n, int64_t k, int count,
                                 const vf32* v) {
  if (dtype == F32) return write_columns<F32>(p, n, k, count, v);
  if (dtype == BF16) return write_columns<BF16>(p, n, k, count, v);
  write_columns<F16>(p, n, k, count, v);
}
FLCORE_INLINE void write_columns(int, const ColumnPlace<char>& p, int n, int64_t k, int count,
                                 const vf64* v) {
  write_columns<F64>(p, n, k, count, v);
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore

