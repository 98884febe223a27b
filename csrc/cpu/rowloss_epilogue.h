// What follows from the sums of one row: its loss and the few factors its gradient is made of.
// In float64, one row at a time; the formulas are told in rowloss.isa.cpp.
#pragma once

#include "api.h"
#include "cpu/isa.h"

namespace flcore {
namespace FLCORE_ISA {

struct RowSums {
  double rest, own;       // R and e_y, multiples of exp(shift)
  double shift;
  double weight, moment;  // sums of u_k and of u_k g_k
};

// k != y:  dx_k = common pi_k f'_k - scale u_k rho_k
// k == y:  dx_y = own_common pi_y f'_y - (own_rho + scale u_y) rho_y
struct RowFactors {
  double loss, common, own_common, own_rho;
};

// hard: (1 - eps) w_y, 0 with soft targets. scale: logit scale times upstream gradient. log_own():
// g_y, for where e_y is too small to divide by.
template <class LogOwn>
FLCORE_INLINE RowFactors row_factors(const RowLossArgs& a, const RowSums& s, double hard,
                                     double scale, const LogOwn& log_own) {
  const double total = s.rest + s.own;
  if (!(total > 0 && total < __builtin_inf())) {
    const double nan = __builtin_nan("");
    return RowFactors{nan, nan, nan, nan};
  }
  const double ratio = s.rest / s.own;
  const bool divides = ratio < __builtin_inf(), spread = s.weight != 0 || s.moment != 0;
  double log_total = 0;
  if (spread || a.z_loss != 0 || !divides) log_total = s.shift + __builtin_log(total);
  double loss = spread ? s.weight * log_total - s.moment : 0.0;
  double slope = s.weight;
  if (a.z_loss != 0) {
    loss += a.z_loss * log_total * log_total;
    slope += 2 * a.z_loss * log_total;
  }
  if (hard != 0) {
    const double own = divides ? __builtin_log1p(ratio) : log_total - log_own();
    if (a.tau == 1) {
      loss += hard * own;
    } else {
      loss += hard * (__builtin_expm1((1 - a.tau) * own) / (1 - a.tau));
      hard *= __builtin_exp((1 - a.tau) * own);
    }
  }
  return RowFactors{loss, scale * (slope + hard) / total, scale * slope / total,
                    scale * hard * (s.rest / total)};
}

}  // namespace FLCORE_ISA
}  // namespace flcore
