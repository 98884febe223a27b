// Rows whose classes lie side by side, one row after the other or all threads on one row.
//   both       Reads block by block; f' of the row stays in cache, and is scaled and written while
//              the next row is read (block_pass): 2 b bytes a logit, one exponential or division.
//              Where f' of a row takes more than KEPT_BYTES, or with targets outside the comp-sum
//              term, it is formed again from x: 3 b bytes for long rows.
//   forward    b bytes, backward 2 b.
// Few rows are cut into their blocks, whose sums are joined in order, so that this shows nowhere.
#pragma once

#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowloss_blocks.h"
#include "cpu/rowloss_epilogue.h"
#include "cpu/rowloss_source.h"
#include "cpu/rowloss_step.h"
#include "cpu/rowloss_store.h"
#include "cpu/rowmap.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t KEPT_BYTES = 1 << 20;  // f' of a row that is kept at most
constexpr int64_t STREAM_BYTES = 8 << 20;  // gradients of this size are written past the caches

FLCORE_INLINE int64_t kept_bytes(const RowLossArgs& a) {
  const int64_t bytes = (a.classes + 63) / 64 * 64 * (a.dtype == F64 ? 8 : 4);
  const bool wanted = a.grad && !a.soft && a.smoothing == 0 && bytes <= KEPT_BYTES;
  return wanted ? bytes : 0;
}

// Bytes that one thread needs.
static int64_t rows_scratch(const RowLossArgs& a) {
  const int64_t blocks = row_blocks(a);
  return whole_lines(kept_bytes(a)) + whole_lines(blocks * int64_t(sizeof(RowPart<double>))) +
         whole_lines((blocks + 1) * 8) + whole_lines(blocks * 8);
}

template <int D>
class RowVisitor : RowSource<D> {
  typedef RowSource<D> Source;
  typedef typename Source::T T;
  typedef typename Source::Row Row;
  using Source::a_;
  using Source::at_;
  using Source::blocks_;
  using Source::computed;
  using Source::size;
  using Source::stored;
  static constexpr int C = Source::C;
  static constexpr double INF = __builtin_inf();

  const bool exp_;
  const RowKernels<C> kernels_;
  const RowDirect<D> direct_;
  T* const kept_;
  RowPart<T>* const parts_;
  double* const powers_;  // exp of (the target's logit, then each block's shift) - m
  T* const factors_;      // of the row that is written, for each block
  const bool stream_;

 public:
  RowVisitor(const RowLossArgs& a, char* scratch)
      : Source(a),
        exp_(a.map == ROW_SOFTMAX),
        kernels_(row_kernels<C>(a)),
        direct_(row_direct<D>(a)),
        kept_(kept_bytes(a) ? reinterpret_cast<T*>(scratch) : nullptr),
        parts_(reinterpret_cast<RowPart<T>*>(scratch + whole_lines(kept_bytes(a)))),
        powers_(reinterpret_cast<double*>(
            reinterpret_cast<char*>(parts_) +
            whole_lines(blocks_ * int64_t(sizeof(RowPart<double>))))),
        factors_(reinterpret_cast<T*>(reinterpret_cast<char*>(powers_) +
                                      whole_lines((blocks_ + 1) * 8))),
        stream_(a.grad && a.grad != a.x &&
                a.rows * a.classes * dtype_bytes(a.dtype) >= STREAM_BYTES) {}

  void forward(int64_t first, int64_t end) const {
    for (int64_t i = first; i < end; ++i) {
      Row row = start(i);
      if (!at_.counts(i)) {
        at_.write(i, 0, 0, 0, 0);
        continue;
      }
      for (int64_t b = 0; b < blocks_; ++b) sums(row, b);
      finish(row, join(row), true);
    }
  }

  void both(int64_t first, int64_t end) const {
    Row last{};
    bool waiting = false;
    for (int64_t i = first; i < end; ++i) {
      Row row = start(i);
      if (!at_.counts(i)) {
        at_.write(i, 0, 0, 0, 0);
        zero(row);
        continue;
      }
      if (kept_) {
        for (int64_t b = 0; b < blocks_; ++b) step(row, b, waiting ? &last : nullptr);
        finish(row, join(row), true);
        for (int64_t b = 0; b < blocks_; ++b) block_factor(row, b);
        last = row;
        waiting = true;
      } else {
        for (int64_t b = 0; b < blocks_; ++b) sums(row, b);
        finish(row, join(row), true);
        for (int64_t b = 0; b < blocks_; ++b) gradient(row, b);
      }
    }
    if (waiting)
      for (int64_t b = 0; b < blocks_; ++b) write_kept(last, b);
    if (stream_) row_stream_end();
  }

  void backward(int64_t first, int64_t end) const {
    for (int64_t i = first; i < end; ++i) {
      Row row = start(i);
      if (!at_.counts(i)) {
        zero(row);
        continue;
      }
      from_stats(row);
      for (int64_t b = 0; b < blocks_; ++b) gradient(row, b);
    }
    if (stream_) row_stream_end();
  }

  // All threads on one row after the other.
  void split(int mode) const {
    for (int64_t i = 0; i < a_.rows; ++i) {
      Row row = start(i);
      if (!at_.counts(i)) {
        if (mode != ROW_BACKWARD) at_.write(i, 0, 0, 0, 0);
        if (mode != ROW_FORWARD) zero(row);
        continue;
      }
      const bool keep = kept_ && mode == ROW_BOTH;
      if (mode == ROW_BACKWARD) {
        from_stats(row);
      } else {
        for_chunks(blocks_, a_.threads, [&](int64_t b) {
          if (keep)
            step(row, b, nullptr);
          else
            sums(row, b);
        });
        finish(row, join(row), true);
      }
      if (mode == ROW_FORWARD) continue;
      for_chunks(blocks_, a_.threads, [&](int64_t b) {
        if (keep) {
          block_factor(row, b);
          write_kept(row, b);
        } else {
          gradient(row, b);
        }
        if (stream_) row_stream_end();
      });
    }
  }

 private:
  Row start(int64_t i) const {
    const double t = at_.scale(i);
    char* const grad = a_.grad ? at_.grad(i) : nullptr;
    if (stream_) __builtin_prefetch(grad + a_.classes * dtype_bytes(D) - 1, 1);  // part of a line
    return Row{i, at_.target(i), at_.x(i), grad, T(t), t * at_.upstream(i), 0, 0, 0, {}, 0, 0};
  }

  // ---- sums ------------------------------------------------------------------------------------

  void sums(const Row& row, int64_t b) const {
    if (direct_.sums)
      direct_.sums(stored(row, b), parts_[b], nullptr, nullptr);
    else
      computed(row, b, [&](const RowBlock<C>& block) {
        kernels_.sums(block, parts_[b], nullptr, nullptr);
      });
  }

  // Reads a block, keeping f', after or while writing that of the row before.
  void step(const Row& row, int64_t b, const Row* last) const {
    RowWriter<D> writer{};
    T* const kept = kept_ + b * ROW_BLOCK;
    if (last) start_writer(*last, b, kept, factors_[b], writer);
    if (direct_.step) {
      direct_.step(stored(row, b), parts_[b], kept, &writer);
    } else {
      writer.finish();
      computed(row, b, [&](const RowBlock<C>& block) {
        kernels_.sums(block, parts_[b], kept, nullptr);
      });
    }
  }

  static double exponent(T c, T n, double m) {  // exp of it: exp(c + n ln 2 - m)
    return (double(c) - m) + double(n) * 0x1.62e42fefa39efp-1;
  }

  double log_own(const Row& row) const {
    const vf64 z = splat<vf64>(double(row.term.z));
    if (exp_) return double(row.term.z);
    const vf64 g = a_.map == ROW_STABLEMAX ? row_log_map<ROW_STABLEMAX>(z) : row_log_map<ROW_TAYLOR>(z);
    return g[0] + (a_.prior ? row_log(double(row.term.prior)) : 0.0);
  }

  void own_terms(Row& row) const {
    row.term = RowTerms<T>{T(-INF), T(0), T(0)};
    if (row.y >= 0) row.term = row_term<D>(stored(row, 0), row.y, T(0), exp_);
  }
  // f and rho of the target; powers[0] is its exponential.
  void own_values(Row& row) const {
    const double z = double(row.term.z), prior = double(row.term.prior);
    row.f = row.rho = 0;
    if (z == -INF) return;
    if (exp_) {
      row.f = powers_[0];
      row.rho = 1;
    } else if (a_.map == ROW_STABLEMAX) {
      const double a = 1 + (z < 0 ? -z : z);
      row.rho = 1 / a;
      row.f = (z >= 0 ? a : row.rho) * prior;
    } else {
      row.f = ((z + 1) * (z + 1) + 1) * 0.5;
      row.rho = (z + 1) / row.f;
      row.f *= prior;
    }
  }

  // From the sums of the blocks to those of the row.
  RowSums join(Row& row) const {
    RowSums s{};
    own_terms(row);
    if (exp_) {
      T m = row.term.z > T(-INF) ? row.term.z : T(-INF);
      for (int64_t b = 0; b < blocks_; ++b) m = parts_[b].m > m ? parts_[b].m : m;
      s.shift = double(m);
      powers_[0] = double(row.term.z) - s.shift;
      for (int64_t b = 0; b < blocks_; ++b)
        powers_[b + 1] = exponent(parts_[b].c, parts_[b].n, s.shift);
      for (int64_t b = 0; b <= blocks_; b += LANES64)
        store(powers_ + b, row_exp_full(load<vf64>(powers_ + b)));
    }
    own_values(row);
    for (int64_t b = 0; b < blocks_; ++b) {
      const RowPart<T>& part = parts_[b];
      s.rest += exp_ && part.sum != 0 ? part.sum * powers_[b + 1] : part.sum;
      s.weight += part.weight;
      s.moment += part.moment;
    }
    s.own = row.f;
    if (row.y >= 0 && row.term.u != 0) {
      s.weight += double(row.term.u);
      s.moment += double(row.term.u) * log_own(row);
    }
    return s;
  }

  void from_stats(Row& row) const {
    RowSums s{};
    s.rest = at_.number(a_.rest, row.i);
    s.own = at_.number(a_.own, row.i);
    s.shift = exp_ ? at_.number(a_.shift, row.i) : 0.0;
    if (a_.soft)
      for (int64_t b = 0; b < blocks_; ++b) {
        sums(row, b);
        s.weight += parts_[b].weight;
      }
    else if (a_.smoothing != 0)
      s.weight = a_.smoothing * a_.weight_sum / a_.classes_present;
    own_terms(row);
    if (exp_) powers_[0] = row_exp_full(double(row.term.z) - s.shift);
    own_values(row);
    finish(row, s, false);
  }

  void finish(Row& row, const RowSums& s, bool write) const {
    const RowFactors f = row_factors(a_, s, at_.hard(row.y), row.upstream,
                                     [&] { return row.y >= 0 ? log_own(row) : -INF; });
    if (write) at_.write(row.i, f.loss, s.rest, s.own, s.shift);
    row.shift = s.shift;
    row.common = f.common;
    row.own = f.own_common * row.f * row.rho -
              (f.own_rho + row.upstream * double(row.term.u)) * row.rho;
    if (row.rho == 0) row.own = 0;  // a masked class, whatever the loss
    if (f.common != f.common) row.own = f.common;
  }

  // ---- gradients -------------------------------------------------------------------------------

  void block_factor(const Row& row, int64_t b) const {
    double by = row.common;
    if (by != by) {  // the same NaN everywhere, whichever there are in the row
      __builtin_memset(kept_ + b * ROW_BLOCK, 0, size_t(size(b)) * sizeof(T));
    } else if (exp_) {
      const RowPart<T>& part = parts_[b];
      by *= powers_[b + 1];
      // large exponentials that were not shifted: by alone would underflow
      if ((by < 0 ? -by : by) < 0x1p-100 && part.c == 0 && part.n == 0 && part.m > 4) {
        for (int64_t k = 0; k < size(b); ++k) kept_[b * ROW_BLOCK + k] *= T(0x1p-48);
        by *= 0x1p48;
      }
    }
    factors_[b] = T(by);
  }

  // Writes block b of a row from `values`.
  void start_writer(const Row& row, int64_t b, const T* values, T by, RowWriter<D>& writer) const {
    const int64_t k = b * ROW_BLOCK, n = size(b);
    writer.start(values, by, row.grad + k * dtype_bytes(D), n, stream_,
                 row.y >= k && row.y < k + n ? row.y - k : -1, T(row.own));
  }
  void write_kept(const Row& row, int64_t b) const {
    RowWriter<D> writer;
    start_writer(row, b, kept_ + b * ROW_BLOCK, factors_[b], writer);
    writer.finish();
  }

  void gradient(const Row& row, int64_t b) const {
    alignas(64) T entries[ROW_BLOCK];
    RowWriter<D> writer;
    start_writer(row, b, entries, T(1), writer);
    if (row.common != row.common) {
      for (int64_t k = 0; k < ROW_BLOCK; ++k) entries[k] = T(row.common);
      writer.finish();
      return;
    }
    RowSlope<T> by{0, 0, T(row.common), T(row.upstream)};
    if (exp_) {
      block_shift(T(row.shift), by.c, by.n);
      by.common = T(row.common * row_exp_full(exponent(by.c, by.n, row.shift)));
    }
    if (direct_.gradient) {
      direct_.gradient(stored(row, b), by, entries, &writer);
    } else {
      computed(row, b, [&](const RowBlock<C>& block) {
        kernels_.gradient(block, by, entries, nullptr);
      });
      writer.finish();
    }
  }

  void zero(const Row& row) const {
    __builtin_memset(row.grad, 0, size_t(a_.classes * dtype_bytes(D)));
  }
};

// Rows first to end - 1; first = -1: all rows, each by all threads.
template <int D>
static void rows_visit(const RowLossArgs& a, int mode, int64_t first, int64_t end, char* scratch) {
  const RowVisitor<D> visitor(a, scratch);
  if (first < 0)
    visitor.split(mode);
  else if (mode == ROW_FORWARD)
    visitor.forward(first, end);
  else if (mode == ROW_BOTH)
    visitor.both(first, end);
  else
    visitor.backward(first, end);
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
