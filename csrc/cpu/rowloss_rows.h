// Rows whose classes lie side by side, one row after the other or all threads on one row.
//   both       Reads block by block; f' of the row stays in cache, and is scaled and written while the
//              next row is read (rowloss_step.h): 2 b bytes a logit, one exponential or division.
//              In cache the row is too large for (KEPT_BYTES), or with targets outside the comp-sum
//              term, f' is formed again from x: for long rows 3 b bytes.
//   forward    b bytes, backward 2 b.
// Few rows are cut into their blocks, whose sums are joined in order, so that this shows nowhere.
#pragma once

#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowloss_blocks.h"
#include "cpu/rowloss_epilogue.h"
#include "cpu/rowloss_step.h"
#include "cpu/rowloss_store.h"
#include "cpu/rowmap.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t KEPT_BYTES = 1 << 20;  // f' of a row that is kept at most
constexpr int64_t STREAM_BYTES = 8 << 20;  // gradients of this size are written past the caches

FLCORE_INLINE int64_t row_blocks(const RowLossArgs& a) {
  return (a.classes + ROW_BLOCK - 1) / ROW_BLOCK;
}
FLCORE_INLINE int64_t kept_bytes(const RowLossArgs& a) {
  const int64_t bytes = (a.classes + 63) / 64 * 64 * (a.dtype == F64 ? 8 : 4);
  const bool wanted = a.grad && !a.soft && a.smoothing == 0 && bytes <= KEPT_BYTES;
  return wanted ? bytes : 0;
}

// Bytes that one thread needs.
static int64_t rows_scratch(const RowLossArgs& a) {
  return whole_lines(kept_bytes(a)) + whole_lines(row_blocks(a) * int64_t(sizeof(RowPart<double>))) +
         whole_lines(row_blocks(a) * 8);
}

template <int D, int MAP, int FORM>
class RowVisitor {
  typedef typename RowCompute<D>::Number T;
  typedef RowReader<D, MAP, FORM> R;
  static constexpr bool EXP = MAP == ROW_SOFTMAX;
  static constexpr double INF = __builtin_inf();

  const RowLossArgs& a_;
  const RowAccess<D> at_;
  const int64_t blocks_;
  T* const kept_;
  RowPart<T>* const parts_;
  T* const factors_;  // of the row that is written, for each block
  const bool stream_;

  // What is known of a row once its sums are.
  struct Row {
    int64_t i;
    double target;  // gradient entry of the target
    double shift, common, spread;
  };

 public:
  RowVisitor(const RowLossArgs& a, char* scratch)
      : a_(a),
        at_(a),
        blocks_(row_blocks(a)),
        kept_(kept_bytes(a) ? reinterpret_cast<T*>(scratch) : nullptr),
        parts_(reinterpret_cast<RowPart<T>*>(scratch + whole_lines(kept_bytes(a)))),
        factors_(reinterpret_cast<T*>(
            reinterpret_cast<char*>(parts_) +
            whole_lines(blocks_ * int64_t(sizeof(RowPart<double>))))),
        stream_(a.grad && a.grad != a.x &&
                a.rows * a.classes * dtype_bytes(a.dtype) >= STREAM_BYTES) {}

  void forward(int64_t first, int64_t end) const {
    for (int64_t i = first; i < end; ++i) {
      if (!at_.counts(i)) {
        at_.write(i, 0, 0, 0, 0);
        continue;
      }
      for (int64_t b = 0; b < blocks_; ++b) sums(i, b);
      finish(i, join(i), true);
    }
  }

  void both(int64_t first, int64_t end) const {
    if (FORM == ROW_SPREAD || !kept_) {
      for (int64_t i = first; i < end; ++i) {
        if (!at_.counts(i)) {
          ignore(i);
          continue;
        }
        for (int64_t b = 0; b < blocks_; ++b) sums(i, b);
        const Row row = finish(i, join(i), true);
        for (int64_t b = 0; b < blocks_; ++b) gradient(row, b);
        write_target(row);
      }
    } else {
      Row last{};
      bool waiting = false;
      for (int64_t i = first; i < end; ++i) {
        if (!at_.counts(i)) {
          ignore(i);
          continue;
        }
        for (int64_t b = 0; b < blocks_; ++b) step(i, b, waiting ? &last : nullptr);
        if (waiting) write_target(last);
        last = finish(i, join(i), true);
        block_factors(last, 0, blocks_);
        waiting = true;
      }
      if (waiting) {
        for (int64_t b = 0; b < blocks_; ++b) write_kept(last, b);
        write_target(last);
      }
    }
    if (stream_) row_stream_end();
  }

  void backward(int64_t first, int64_t end) const {
    for (int64_t i = first; i < end; ++i) {
      if (!at_.counts(i)) {
        zero(i);
        continue;
      }
      const Row row = from_stats(i);
      for (int64_t b = 0; b < blocks_; ++b) gradient(row, b);
      write_target(row);
    }
    if (stream_) row_stream_end();
  }

  // All threads on one row after the other.
  void split(int mode) const {
    for (int64_t i = 0; i < a_.rows; ++i) {
      if (!at_.counts(i)) {
        if (mode != 2) at_.write(i, 0, 0, 0, 0);
        if (mode != 0) zero(i);
        continue;
      }
      const bool keep = FORM != ROW_SPREAD && kept_ && mode == 1;
      if (mode != 2)
        for_chunks(blocks_, a_.threads, [&](int64_t b) {
          if (keep)
            step(i, b, nullptr);
          else
            sums(i, b);
        });
      const Row row = mode == 2 ? from_stats(i) : finish(i, join(i), true);
      if (mode == 0) continue;
      if (keep) block_factors(row, 0, blocks_);
      for_chunks(blocks_, a_.threads, [&](int64_t b) {
        if (keep)
          write_kept(row, b);
        else
          gradient(row, b);
        if (stream_) row_stream_end();
      });
      write_target(row);
    }
  }

 private:
  const char* x_at(int64_t i, int64_t k) const {
    return static_cast<const char*>(a_.x) + at_.x(i, k) * dtype_bytes(D);
  }
  char* grad_at(int64_t i, int64_t k) const {
    return static_cast<char*>(a_.grad) + at_.grad(i, k) * dtype_bytes(D);
  }
  int64_t size(int64_t b) const {
    const int64_t rest = a_.classes - b * ROW_BLOCK;
    return rest < ROW_BLOCK ? rest : ROW_BLOCK;
  }

  RowBlock<D> block(int64_t i, int64_t b) const {
    const int64_t k = b * ROW_BLOCK, n = size(b), y = at_.target(i);
    const T* prior = static_cast<const T*>(a_.prior);
    const T* weight = static_cast<const T*>(a_.weight);
    const double spread = a_.smoothing != 0 ? a_.smoothing / a_.classes_present : 0.0;
    return RowBlock<D>{
        x_at(i, k),
        n,
        y >= k && y < k + n ? y - k : -1,
        T(at_.scale(i)),
        T(a_.labels ? a_.margin : 0.0),
        prior ? prior + k : nullptr,
        weight ? weight + k : nullptr,
        a_.soft ? static_cast<const char*>(a_.soft) + (i * a_.classes + k) * dtype_bytes(D) : nullptr,
        T(1 - a_.smoothing),
        T(spread),
        nullptr};
  }

  // ---- sums ------------------------------------------------------------------------------------

  void sums(int64_t i, int64_t b) const {
    const RowBlock<D> block = this->block(i, b);
    block_shift<D, MAP, FORM>(block, parts_[b]);
    block_sums<D, MAP, FORM>(block, parts_[b]);
  }

  void step(int64_t i, int64_t b, const Row* last) const {
    RowBlock<D> block = this->block(i, b);
    if (EXP)  // whose largest value is looked for first, when nothing is written
      block.ahead = b + 1 < blocks_ ? x_at(i, (b + 1) * ROW_BLOCK)
                    : i + 1 < a_.rows ? x_at(i + 1, 0)
                                      : nullptr;
    block_shift<D, MAP, FORM>(block, parts_[b]);
    T* const kept = kept_ + b * ROW_BLOCK;
    if constexpr (FORM != ROW_SPREAD) {
      if (last) {
        RowWriter<D> writer;
        writer.start(kept, factors_[b], grad_at(last->i, b * ROW_BLOCK), block.n, stream_);
        block_step<D, MAP, FORM, true>(block, parts_[b], kept, &writer);
      } else {
        block_step<D, MAP, FORM, false>(block, parts_[b], kept, nullptr);
      }
    }
  }

  // exp(c + n ln 2 - m)
  static double factor(T c, T n, double m) {
    return row_exp_full((double(c) - m) + double(n) * 0x1.62e42fefa39efp-1);
  }

  RowTerms<T> own_term(int64_t i, int64_t y) const { return R::term(block(i, 0), y, true); }

  // f, f', rho and g of the target, prior included; f and f' are multiples of exp(shift).
  struct Own {
    double f, slope, rho, log, u;
  };
  Own own(int64_t i, double shift) const {
    const int64_t y = at_.target(i);
    Own own{0, 0, 0, 0, 0};
    if (y < 0) return own;
    const RowTerms<T> t = own_term(i, y);
    const vf64 z = splat<vf64>(double(t.z));
    own.rho = row_rho<MAP>(z)[0];
    own.log = row_log_map<MAP>(z)[0];
    own.u = double(t.u);
    if constexpr (EXP) {
      own.f = own.slope = row_exp_full(double(t.z) - shift);
    } else {
      vf64 f, d;
      row_map<MAP>(z, vf64{}, vf64{}, f, d);
      own.f = f[0], own.slope = d[0];
      if (FORM != ROW_PLAIN && a_.prior) {
        own.f *= double(t.prior);
        own.slope *= double(t.prior);
        own.log += row_log(double(t.prior));
      }
    }
    return own;
  }

  RowSums join(int64_t i) const {
    RowSums s{};
    if (EXP) {
      T m = T(-INF);
      for (int64_t b = 0; b < blocks_; ++b) m = parts_[b].m > m ? parts_[b].m : m;
      const int64_t y = at_.target(i);
      if (y >= 0) {
        const T z = own_term(i, y).z;
        m = z > m ? z : m;
      }
      s.shift = double(m);
    }
    const Own mine = own(i, s.shift);
    for (int64_t b = 0; b < blocks_; ++b) {
      const RowPart<T>& part = parts_[b];
      s.rest += EXP && part.sum != 0 ? part.sum * factor(part.c, part.n, s.shift) : part.sum;
      s.weight += part.weight;
      s.moment += part.moment;
    }
    s.own = mine.f;
    s.log_own = mine.log;
    s.weight += mine.u;
    if (mine.u != 0) s.moment += mine.u * mine.log;
    return s;
  }

  Row from_stats(int64_t i) const {
    RowSums s{};
    s.rest = at_.number(a_.rest, i);
    s.own = at_.number(a_.own, i);
    s.shift = EXP ? at_.number(a_.shift, i) : 0.0;
    s.log_own = own(i, s.shift).log;
    if (FORM == ROW_SPREAD && a_.soft)
      for (int64_t b = 0; b < blocks_; ++b) {
        RowPart<T> part{};
        block_sums<D, MAP, FORM>(block(i, b), part);
        s.weight += part.weight;
      }
    return finish(i, s, false);
  }

  Row finish(int64_t i, RowSums s, bool write) const {
    if (FORM == ROW_SPREAD && !a_.soft && !write)
      s.weight = a_.smoothing * a_.weight_sum / a_.classes_present;
    const double scale = at_.scale(i) * at_.upstream(i);
    const RowFactors f = row_factors(a_, s, at_.hard(at_.target(i)), scale);
    if (write) at_.write(i, f.loss, s.rest, s.own, s.shift);
    const Own mine = own(i, s.shift);
    const double target = f.own_common * mine.slope - (f.own_rho + scale * mine.u) * mine.rho;
    return Row{i, mine.rho == 0 && f.common == f.common ? 0.0 : target, s.shift, f.common, scale};
  }

  // ---- gradients -------------------------------------------------------------------------------

  void block_factors(const Row& row, int64_t first, int64_t end) const {
    for (int64_t b = first; b < end; ++b)
      factors_[b] = T(EXP ? row.common * factor(parts_[b].c, parts_[b].n, row.shift) : row.common);
  }

  void write_kept(const Row& row, int64_t b) const {
    RowWriter<D> writer;
    writer.start(kept_ + b * ROW_BLOCK, factors_[b], grad_at(row.i, b * ROW_BLOCK), size(b), stream_);
    writer.until(writer.n);
  }

  void gradient(const Row& row, int64_t b) const {
    T c = 0, n = 0;
    double common = row.common;
    if (EXP) {
      row_shift(T(row.shift), c, n);
      common *= factor(c, n, row.shift);
    }
    alignas(64) T entries[ROW_BLOCK];
    block_gradient<D, MAP, FORM>(block(row.i, b), c, n, T(common), T(row.spread), entries);
    RowWriter<D> writer;
    writer.start(entries, T(1), grad_at(row.i, b * ROW_BLOCK), size(b), stream_);
    writer.until(writer.n);
  }

  void write_target(const Row& row) const {
    const int64_t y = at_.target(row.i);
    if (y >= 0) store1<D>(grad_at(row.i, y), 0, row.target);
  }

  void zero(int64_t i) const {
    __builtin_memset(grad_at(i, 0), 0, size_t(a_.classes * dtype_bytes(D)));
  }
  void ignore(int64_t i) const {
    at_.write(i, 0, 0, 0, 0);
    zero(i);
  }
};

// ---- choice of the form --------------------------------------------------------------------------

template <int D, int MAP, int FORM>
static void rows_visit(const RowLossArgs& a, int mode, int64_t first, int64_t end, char* scratch) {
  const RowVisitor<D, MAP, FORM> visitor(a, scratch);
  if (first < 0)
    visitor.split(mode);
  else if (mode == 0)
    visitor.forward(first, end);
  else if (mode == 1)
    visitor.both(first, end);
  else
    visitor.backward(first, end);
}

template <int D, int MAP>
static void rows_visit(const RowLossArgs& a, int mode, int64_t first, int64_t end, char* scratch) {
  if (a.soft || a.smoothing != 0)
    rows_visit<D, MAP, ROW_SPREAD>(a, mode, first, end, scratch);
  else if (a.prior || a.margin != 0 || a.logit_scale != 1 || a.row_scale)
    rows_visit<D, MAP, ROW_AFFINE>(a, mode, first, end, scratch);
  else
    rows_visit<D, MAP, ROW_PLAIN>(a, mode, first, end, scratch);
}

// Rows first to end - 1; first = -1: all rows, each by all threads.
template <int D>
static void rows_visit(const RowLossArgs& a, int mode, int64_t first, int64_t end, char* scratch) {
  if (a.map == ROW_SOFTMAX)
    rows_visit<D, ROW_SOFTMAX>(a, mode, first, end, scratch);
  else if (a.map == ROW_STABLEMAX)
    rows_visit<D, ROW_STABLEMAX>(a, mode, first, end, scratch);
  else
    rows_visit<D, ROW_TAYLOR>(a, mode, first, end, scratch);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
