// Where the arrays of a row loss lie, and which rows of it count.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

enum RowMode : int { ROW_FORWARD = 0, ROW_BOTH = 1, ROW_BACKWARD = 2 };

template <int D>
struct RowCompute {
  typedef float Number;
  typedef vf32 Vector;
};
template <>
struct RowCompute<F64> {
  typedef double Number;
  typedef vf64 Vector;
};

// Numbers that are read, mapped and written together: 256 bytes of the compute type.
template <class T>
constexpr int ROW_GROUP = int(256 / sizeof(T));

// One entry of an array of the compute type.
template <int D>
FLCORE_INLINE double row_number(const void* p, int64_t i) {
  return double(static_cast<const typename RowCompute<D>::Number*>(p)[i]);
}

FLCORE_INLINE int64_t row_label(const void* labels, int label_bytes, int64_t i) {
  if (label_bytes == 4) return static_cast<const int32_t*>(labels)[i];
  return static_cast<const int64_t*>(labels)[i];
}

template <int D>
struct RowAccess {
  typedef typename RowCompute<D>::Number T;
  const RowLossArgs& a;

  explicit RowAccess(const RowLossArgs& args) : a(args) {}

  static double number(const void* p, int64_t i) { return row_number<D>(p, i); }

  int64_t place(int64_t i, int64_t outer, int64_t row) const {
    return i < a.inner ? i * row : i / a.inner * outer + i % a.inner * row;
  }
  const char* x(int64_t i) const {
    return static_cast<const char*>(a.x) + place(i, a.outer_stride, a.row_stride) * dtype_bytes(D);
  }
  char* grad(int64_t i) const {
    return static_cast<char*>(a.grad) +
           place(i, a.grad_outer_stride, a.grad_row_stride) * dtype_bytes(D);
  }

  bool counts(int64_t i) const {
    if (a.valid) return a.valid[i] != 0;
    return !a.labels || row_label(a.labels, a.label_bytes, i) != a.ignore_index;
  }
  // The target's class here, or -1: soft targets, or a class of another shard.
  int64_t target(int64_t i) const {
    if (!a.labels) return -1;
    const int64_t k = row_label(a.labels, a.label_bytes, i) - a.label_offset;
    return k >= 0 && k < a.classes ? k : -1;
  }
  double scale(int64_t i) const {
    return a.row_scale ? double(T(a.logit_scale * number(a.row_scale, i))) : double(T(a.logit_scale));
  }
  // (1 - eps) w_y; 0 with soft targets
  double hard(int64_t y) const {
    if (!a.labels) return 0;
    return (1 - a.smoothing) * (a.weight && y >= 0 ? number(a.weight, y) : 1.0);
  }
  double upstream(int64_t i) const {
    return a.upstream ? a.grad_scale * number(a.upstream, i) : a.grad_scale;
  }

  void write(int64_t i, double loss, double rest, double own, double shift) const {
    if (a.loss) static_cast<T*>(a.loss)[i] = T(loss);
    if (a.rest) static_cast<T*>(a.rest)[i] = T(rest);
    if (a.own) static_cast<T*>(a.own)[i] = T(own);
    if (a.shift) static_cast<T*>(a.shift)[i] = T(shift);
  }
};

}  // namespace FLCORE_ISA
}  // namespace flcore
