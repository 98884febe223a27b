// What follows from the sums of a row, for a vector of rows: the loss and the few factors its
// gradient is made of; the formulas are told in rowloss.isa.cpp.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowmap.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// k != y:  dx_k = common pi_k f'_k - scale u_k rho_k
// k == y:  dx_y = own_common pi_y f'_y - (own_rho + scale u_y) rho_y
template <class V>
struct RowEndFactors {
  V loss, common, own_common, own_rho;
};

template <class V>
struct RowEndSums {
  V rest, own, shift;  // R and e_y in units of exp(shift)
  V log_own;           // ln e_y, for where e_y is too small to divide by
};

// Above it log1p(R / e_y) is taken as log S - ln e_y, which loses nothing there.
template <class V>
FLCORE_INLINE V row_ratio_limit() {
  return splat<V>(0x1p20f);
}

// ln S - ln e_y
template <class V>
FLCORE_INLINE V row_gap(const RowEndSums<V>& s, V total) {
  const V ratio = s.rest / s.own, l = row_log1p(ratio);
  const typename Real<V>::I far = ratio > row_ratio_limit<V>();
  return any_lane(far) ? far ? row_log(total) - s.log_own : l : l;
}

template <class V>
FLCORE_INLINE V row_total(const RowEndSums<V>& s) {
  typedef typename Real<V>::T T;
  const V total = s.rest + s.own;
  return ((total > V{}) & (total < T(__builtin_inf()))) ? total : splat<V>(T(__builtin_nan("")));
}

// Nothing but the loss of a target: own_common is 0. Without LOG_GIVEN log_own is not read, and
// ln e_y is taken from e_y where it is wanted.
template <bool LOG_GIVEN, class V>
FLCORE_INLINE RowEndFactors<V> row_end_plain(const RowEndSums<V>& s, V scale, bool want_loss) {
  const V total = row_total(s), per = scale / total;
  RowEndFactors<V> f;
  f.loss = V{};
  if (want_loss) {
    const V ratio = s.rest / s.own;
    f.loss = row_log1p(ratio);
    const typename Real<V>::I far = ratio > row_ratio_limit<V>();
    if (any_lane(far)) {
      const V gap = row_log(total) - (LOG_GIVEN ? s.log_own : row_log(s.own));
      f.loss = far ? gap : f.loss;
    }
    f.loss += total * 0;
  }
  f.common = per;
  f.own_common = V{};
  f.own_rho = s.rest * per;
  return f;
}

// Everything. hard: (1 - eps) w_y, 0 with soft targets. weight, moment: sums of u_c and of
// u_c (g_c - shift). scale: logit scale times upstream gradient.
FLCORE_INLINE RowEndFactors<vf64> row_end(const RowLossArgs& a, const RowEndSums<vf64>& s,
                                          vf64 hard, vf64 weight, vf64 moment, vf64 scale) {
  const vf64 total = row_total(s), log_total = row_log(total);
  RowEndFactors<vf64> f;
  f.loss = weight * log_total - moment;
  vf64 slope = weight;
  if (a.z_loss != 0) {
    const vf64 whole = s.shift + log_total;
    f.loss += a.z_loss * whole * whole;
    slope += 2 * a.z_loss * whole;
  }
  const auto any = hard != 0;
  const vf64 gap = row_gap(s, total);
  if (a.tau == 1) {
    f.loss += any ? hard * gap : vf64{};
  } else {
    const vf64 y = (1 - a.tau) * gap;
    f.loss += any ? hard * (row_expm1(y) / (1 - a.tau)) : vf64{};
    hard = any ? hard * row_exp_full(y) : vf64{};
  }
  f.common = scale * (slope + hard) / total;
  f.own_common = scale * slope / total;
  f.own_rho = scale * hard * (s.rest / total);
  return f;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
