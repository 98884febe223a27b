// Row losses with a lane of a vector for each row: rows of at most COLUMNS classes that lie one
// after the other, turned in registers (transpose.h), and any number of classes whose neighbours
// lie far apart while the rows lie side by side ((N, classes, M) with losses along dimension 1).
//
// The sums of a row run over its classes in order, class k in partial sum k mod 4, flushed into
// float64 every COLUMNS classes: neither the number of lanes nor the rows beside it change a bit.
// Rows that do not count are replaced by zeros before anything is computed.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowloss_batch.h"
#include "cpu/rowloss_columns_io.h"
#include "cpu/rowloss_finish.h"
#include "cpu/rowmap.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// float64 partners of the lanes of V
template <class V>
struct Wide {
  static constexpr int PARTS = Real<V>::WIDTH / LANES64;
  vf64 part[PARTS];
};
FLCORE_INLINE Wide<vf64> widen(const vf64& v) { return {{v}}; }
FLCORE_INLINE Wide<vf32> widen(const vf32& v) {
  const char* at = reinterpret_cast<const char*>(&v);
  return {{__builtin_convertvector(load<vf32h>(at), vf64),
           __builtin_convertvector(load<vf32h>(at + VEC_BYTES / 2), vf64)}};
}
FLCORE_INLINE vf64 narrow(const Wide<vf64>& w) { return w.part[0]; }
FLCORE_INLINE vf32 narrow(const Wide<vf32>& w) {
  const vf32h half[2] = {__builtin_convertvector(w.part[0], vf32h),
                         __builtin_convertvector(w.part[1], vf32h)};
  return load<vf32>(half);
}
template <class V>
FLCORE_INLINE void add_wide(Wide<V>& sum, const V& v) {
  const Wide<V> w = widen(v);
  for (int h = 0; h < Wide<V>::PARTS; ++h) sum.part[h] += w.part[h];
}

// Hard labels and nothing else but a logit scale and upstream gradients: rowloss_batch.h.
static bool columns_plain(const RowLossArgs& a) {
  return a.labels && !a.weight && !a.prior && !a.row_scale && a.smoothing == 0 && a.margin == 0 &&
         a.z_loss == 0 && a.tau == 1;
}

template <int MAP, class V>
struct ColumnGroup {
  typedef typename Real<V>::T T;
  typedef typename Real<V>::I I;
  typedef Wide<V> W;
  static constexpr int WIDTH = Real<V>::WIDTH;

  const RowLossArgs& a;
  const int64_t first;
  const int n;
  ColumnTargets<V> rows;
  bool some_ignored;
  ColumnPlace<const char> from;
  V t, shift, c, power;       // logit scale; softmax: m and how exp(z - m) is taken (row_shift)
  V own_z;                    // z of the target
  W rest, weight, moment;     // R, sum of u, sum of u (g - m)
  V x[COLUMNS], q[COLUMNS];   // classes held: logits (or derivatives), soft targets

  FLCORE_MEMBER ColumnGroup(const RowLossArgs& args, int64_t f, int count)
      : a(args), first(f), n(count), shift{}, c{}, power{}, own_z{}, rest{}, weight{},
        moment{} {}

  FLCORE_MEMBER int held(int64_t k) const {
    return int(a.classes - k < COLUMNS ? a.classes - k : COLUMNS);
  }
  FLCORE_MEMBER V kept(const V& v) const { return (V)((I)v & rows.keep); }
  FLCORE_MEMBER I is_target(int64_t k) const { return rows.target == typename Real<V>::N(k); }
  FLCORE_MEMBER T class_number(const void* p, int64_t k) const {
    return static_cast<const T*>(p)[k];
  }

  // ---- classes k .. of the group --------------------------------------------------------------

  FLCORE_MEMBER void read(int64_t k) {
    const int count = held(k);
    read_columns(a.dtype, from, n, k, count, x);
    if (some_ignored)
      for (int j = 0; j < count; ++j) x[j] = kept(x[j]);
    if (a.soft) {
      ColumnPlace<const char> at;
      place_rows(soft_of(a), first, n, WIDTH, at);
      read_columns(a.dtype, at, n, k, count, q);
    }
  }

  FLCORE_MEMBER V logit(const V& value, int64_t k) const {
    V z = value * t;
    if (a.margin != 0 && a.labels) z = is_target(k) ? z : z + T(a.margin);
    return z;
  }
  FLCORE_MEMBER bool has_prior() const { return a.prior; }
  // e_k and its derivative pi_k f'_k, in the units of the sums
  FLCORE_MEMBER void terms(const V& z, int64_t k, V& e, V& d) const {
    if (!has_prior()) return row_map<MAP>(z, c, power, e, d);
    const T prior = class_number(a.prior, k);
    if (MAP == ROW_SOFTMAX) return row_map<MAP>(z + prior, c, power, e, d);
    row_map<MAP>(z, c, power, e, d);
    e *= prior;
    d *= prior;
  }
  // g_k - m
  FLCORE_MEMBER V log_term(const V& z, int64_t k) const {
    V g = row_log_map<MAP>(z);
    if (a.prior) {
      const T prior = class_number(a.prior, k);
      g += MAP == ROW_SOFTMAX ? splat<V>(prior) : row_log(splat<V>(prior));
    }
    return MAP == ROW_SOFTMAX ? g - shift : g;
  }
  FLCORE_MEMBER bool has_targets() const { return a.soft || a.smoothing != 0; }
  // u_k
  FLCORE_MEMBER V target_weight(int64_t k, int j) const {
    T spread = 0;
    if (a.smoothing != 0) {
      const T masked = MAP == ROW_SOFTMAX ? -T(__builtin_inf()) : T(0);
      if (!a.prior || class_number(a.prior, k) != masked)
        spread = T(a.smoothing / a.classes_present);
    }
    V u = splat<V>(spread);
    if (a.soft) u += q[j] * T(1 - a.smoothing);
    return a.weight ? u * class_number(a.weight, k) : u;
  }

  // ---- passes ---------------------------------------------------------------------------------

  FLCORE_MEMBER void find_shift(int64_t k) {
    const int count = held(k);
    for (int j = 0; j < count; ++j) {
      V z = logit(x[j], k + j);
      if (has_prior()) z += class_number(a.prior, k + j);
      shift = vmax(shift, z);
    }
  }

  FLCORE_MEMBER void sum(int64_t k) {
    const int count = held(k);
    V part[4] = {};
    const auto one = [&](int j, V& partial) FLCORE_LAMBDA {
      const V z = logit(x[j], k + j);
      V e, d;
      terms(z, k + j, e, d);
      const I own = is_target(k + j);
      partial += (V)((I)e & ~own);
      own_z = own ? z : own_z;
      if (has_targets()) {
        const V u = target_weight(k + j, j);
        if (a.soft) add_wide(weight, u);
        add_wide(moment, u != V{} ? u * log_term(z, k + j) : V{});
      }
    };
    int j = 0;
    for (; j + 4 <= count; j += 4)
      unroll<4>([&](auto i) FLCORE_LAMBDA {
        one(j + decltype(i)::value, part[decltype(i)::value]);
      });
    for (; j < count; ++j) one(j, part[j & 3]);
    add_wide(rest, (part[0] + part[1]) + (part[2] + part[3]));
  }

  // The logits in x become the gradient.
  FLCORE_MEMBER void gradient(int64_t k, const RowEndFactors<V>& f, const V& scale) {
    const int count = held(k);
    for (int j = 0; j < count; ++j) {
      const V z = logit(x[j], k + j), rho = row_rho<MAP>(z);
      const I own = is_target(k + j);
      V e, d;
      terms(z, k + j, e, d);
      V g = own ? f.own_common * d - f.own_rho * rho : f.common * d;
      if (has_targets()) g -= scale * target_weight(k + j, j) * rho;
      x[j] = kept(g);
    }
  }

  // ---- the group ------------------------------------------------------------------------------

  // entries of a class table at the targets, `fill` for rows without one
  FLCORE_MEMBER V of_target(const void* table, T fill) const {
    T v[WIDTH];
    for (int r = 0; r < WIDTH; ++r)
      v[r] = rows.target[r] >= 0 ? class_number(table, rows.target[r]) : fill;
    return load<V>(v);
  }

  FLCORE_MEMBER void write_stats(const V& loss, const V& r, const V& own) const {
    put_lanes(a.loss, first, n, kept(loss));
    put_lanes(a.rest, first, n, kept(r));
    put_lanes(a.own, first, n, kept(own));
    put_lanes(a.shift, first, n, kept(shift));
  }

  FLCORE_MEMBER RowEndFactors<V> finish(int mode, const V& scale) {
    const bool softmax = MAP == ROW_SOFTMAX;
    RowEndSums<V> s;
    V own_d;
    s.shift = shift;
    s.rest = narrow(rest);
    if (has_prior()) {
      const V prior = of_target(a.prior, softmax ? T(0) : T(1));
      row_map<MAP>(softmax ? own_z + prior : own_z, c, power, s.own, own_d);
      if (!softmax) s.own *= prior;
      s.log_own = own_z + prior - shift;
    } else {
      row_map<MAP>(own_z, c, power, s.own, own_d);
      s.log_own = own_z - shift;
    }
    s.own = rows.target >= 0 ? s.own : V{};
    if (softmax) {
      const V factor = row_factor(shift, c, power);
      s.rest *= factor;
      s.own *= factor;
    }
    if (mode == ROW_BACKWARD) {
      s.rest = some_lanes<V>(a.rest, first, n, T(0));
      s.own = some_lanes<V>(a.own, first, n, T(0));
    }
    if (!softmax)
      s.log_own = row_log(s.own);
    else if (a.shard)  // most shards do not see the target's logit
      s.log_own = row_log(vmax(splat<V>(Real<V>::TINY), s.own));
    W loss, common, own_common, own_rho;
    const V w = a.weight ? of_target(a.weight, T(1)) : splat<V>(1);
    const W hard = widen(a.labels ? w * T(1 - a.smoothing) : V{}), wide_scale = widen(scale);
    const W r = widen(s.rest), o = widen(s.own), m = widen(s.shift), l = widen(s.log_own);
    for (int h = 0; h < W::PARTS; ++h) {
      const RowEndFactors<vf64> p =
          row_end(a, RowEndSums<vf64>{r.part[h], o.part[h], m.part[h], l.part[h]}, hard.part[h],
                  weight.part[h], moment.part[h], wide_scale.part[h]);
      loss.part[h] = p.loss;
      common.part[h] = p.common;
      own_common.part[h] = p.own_common;
      own_rho.part[h] = p.own_rho;
    }
    RowEndFactors<V> f = {narrow(loss), narrow(common), narrow(own_common), narrow(own_rho)};
    if (mode != ROW_BACKWARD) write_stats(f.loss, s.rest, s.own);
    if (softmax) {
      const V factor = row_factor(shift, c, power);
      f.common *= factor;
      f.own_common *= factor;
    }
    return f;
  }

  FLCORE_MEMBER void run(int mode) {
    rows = column_targets<V>(a, first, n);
    some_ignored = any_lane(~rows.keep);
    ColumnPlace<char> to;
    if (mode != ROW_FORWARD)
      place_rows(gradient_of(a), first, n, WIDTH, to);
    if (!any_lane(rows.keep)) {
      if (mode != ROW_BACKWARD) write_stats(V{}, V{}, V{});
      if (mode == ROW_FORWARD) return;
      for (V& v : x) v = V{};
      for (int64_t k = 0; k < a.classes; k += COLUMNS) write_columns(a.dtype, to, n, k, held(k), x);
      return;
    }
    place_rows(logits_of(a), first, n, WIDTH, from);
    const bool whole = a.classes <= COLUMNS;
    t = splat<V>(T(a.logit_scale));
    if (a.row_scale) t *= some_lanes<V>(a.row_scale, first, n, T(1));
    if (a.smoothing != 0 && !a.soft)
      for (vf64& part : weight.part) part += a.smoothing * (a.weight_sum / a.classes_present);
    if (whole) read(0);
    if (MAP == ROW_SOFTMAX) {
      if (mode == ROW_BACKWARD) {
        shift = some_lanes<V>(a.shift, first, n, T(0));
      } else {
        shift -= T(__builtin_inf());
        for (int64_t k = 0; k < a.classes; k += COLUMNS) {
          if (!whole) read(k);
          find_shift(k);
        }
      }
      row_shift(shift, c, power);
    }
    const bool sums = mode != ROW_BACKWARD || ((a.soft || (a.tau != 1 && !a.shard)));
    if (sums)
      for (int64_t k = 0; k < a.classes; k += COLUMNS) {
        if (!whole) read(k);
        sum(k);
      }
    V scale = splat<V>(T(a.grad_scale));
    if (a.upstream && mode != ROW_FORWARD) scale *= some_lanes<V>(a.upstream, first, n, T(0));
    scale = kept(scale * t);
    const RowEndFactors<V> f = finish(mode, scale);
    if (mode == ROW_FORWARD) return;
    for (int64_t k = 0; k < a.classes; k += COLUMNS) {
      if (!whole) read(k);
      gradient(k, f, scale);
      write_columns(a.dtype, to, n, k, held(k), x);
    }
  }
};

// Rows from `first` on that go into one vector of `width` lanes.
FLCORE_INLINE int64_t group_size(const RowLossArgs& a, int64_t first, int64_t end, int64_t width) {
  const int64_t n = end - first < width ? end - first : width;
  if (a.class_stride == 1 || a.row_stride != 1) return n;
  // rows side by side end where the inner dimension does
  const int64_t beside = a.inner - first % a.inner;
  return n < beside ? n : beside;
}

template <int MAP, class V>
static void columns_rows(const RowLossArgs& a, int mode, int64_t first, int64_t end) {
  while (first < end) {
    const int64_t n = group_size(a, first, end, Real<V>::WIDTH);
    ColumnGroup<MAP, V> group(a, first, int(n));
    group.run(mode);
    first += n;
  }
}

template <int MAP, int D>
static void columns_batches(const RowLossArgs& a, int mode, int64_t first, int64_t end) {
  typedef ColumnBatch<MAP, D> Batch;
  Batch batch(a, mode);
  const int capacity = batch.capacity();
  while (first < end) {
    int groups = 0;
    for (; groups < capacity && first < end; ++groups) {
      batch.first[groups] = first;
      batch.n[groups] = int(group_size(a, first, end, Batch::WIDTH));
      first += batch.n[groups];
    }
    batch.run(groups);
  }
  batch.finish_writing();
}

template <int D>
static void columns_visit(const RowLossArgs& a, int mode, int64_t first, int64_t rows, char*) {
  typedef typename RowCompute<D>::Vector V;
  const int64_t end = first + rows;
  if constexpr (D != F64) {
    const bool batch = columns_plain(a) && a.classes <= COLUMNS;
    if (batch && a.map == ROW_SOFTMAX) return columns_batches<ROW_SOFTMAX, D>(a, mode, first, end);
    if (batch && a.map == ROW_STABLEMAX)
      return columns_batches<ROW_STABLEMAX, D>(a, mode, first, end);
  }
  if (a.map == ROW_SOFTMAX) return columns_rows<ROW_SOFTMAX, V>(a, mode, first, end);
  if (a.map == ROW_STABLEMAX) return columns_rows<ROW_STABLEMAX, V>(a, mode, first, end);
  columns_rows<ROW_TAYLOR, V>(a, mode, first, end);
}

static int64_t columns_scratch(const RowLossArgs&) { return 0; }

}  // namespace FLCORE_ISA
}  // namespace flcore
