// The rows of a row loss as blocks of classes, converted to the compute type where their storage type
// has no kernel of its own.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowloss_blocks.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

FLCORE_INLINE int64_t row_blocks(const RowLossArgs& a) {
  return (a.classes + ROW_BLOCK - 1) / ROW_BLOCK;
}

// A row, and what is known of it once its sums are.
template <class T>
struct RowState {
  int64_t i, y;
  const char* x;
  char* grad;
  T scale;
  double upstream;             // times the logit scale
  double shift, common, own;   // own: the gradient's entry of the target
  RowTerms<T> term;            // of the target
  double f, rho;               // of the target, f with the prior, a multiple of exp(shift)
};


template <int D>
struct RowSource {
  typedef typename RowCompute<D>::Number T;
  typedef RowState<T> Row;
  static constexpr int C = D == F64 ? F64 : F32;  // compute type

  const RowLossArgs& a_;
  const RowAccess<D> at_;
  const int64_t blocks_;
  const double spread_;

  explicit RowSource(const RowLossArgs& a)
      : a_(a),
        at_(a),
        blocks_(row_blocks(a)),
        spread_(a.smoothing != 0 ? a.smoothing / a.classes_present : 0.0) {}

  int64_t size(int64_t b) const {
    const int64_t rest = a_.classes - b * ROW_BLOCK;
    return rest < ROW_BLOCK ? rest : ROW_BLOCK;
  }
  // Block b of a row, of logits (and soft targets) at x.
  template <int S>
  RowBlock<S> block(const Row& row, int64_t b, const char* x, const char* soft) const {
    const int64_t k = b * ROW_BLOCK, n = size(b);
    const T* prior = static_cast<const T*>(a_.prior);
    const T* weight = static_cast<const T*>(a_.weight);
    return RowBlock<S>{x,
                       n,
                       row.y >= k && row.y < k + n ? row.y - k : -1,
                       row.scale,
                       T(a_.labels ? a_.margin : 0.0),
                       prior ? prior + k : nullptr,
                       weight ? weight + k : nullptr,
                       soft,
                       T(1 - a_.smoothing),
                       T(spread_),
                       S == D ? ahead(row, b) : x};
  }
  const char* soft(const Row& row, int64_t k) const {
    if (!a_.soft) return nullptr;
    return static_cast<const char*>(a_.soft) + (row.i * a_.classes + k) * dtype_bytes(D);
  }
  // What is read after this block.
  const char* ahead(const Row& row, int64_t b) const {
    if (b + 1 < blocks_) return row.x + (b + 1) * ROW_BLOCK * dtype_bytes(D);
    return row.i + 1 < a_.rows ? at_.x(row.i + 1) : row.x;
  }
  RowBlock<D> stored(const Row& row, int64_t b) const {
    const int64_t k = b * ROW_BLOCK;
    return block<D>(row, b, row.x + k * dtype_bytes(D), soft(row, k));
  }
  // body(block) with a block of the compute type
  template <class Body>
  void computed(const Row& row, int64_t b, const Body& body) const {
    if constexpr (C == D) {
      body(stored(row, b));
    } else {
      alignas(64) T x[ROW_BLOCK], q[ROW_BLOCK];
      const int64_t k = b * ROW_BLOCK, n = size(b);
      row_floats<D>(row.x + k * dtype_bytes(D), ahead(row, b), n, x);
      const char* from = soft(row, k);
      if (from) row_floats<D>(from, from, n, q);
      body(block<C>(row, b, reinterpret_cast<const char*>(x),
                    from ? reinterpret_cast<const char*>(q) : nullptr));
    }
  }
};

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
