// Cross-entropies of rows of logits with their gradient: softmax, StableMax and Taylor-softmax,
// with class weights, label smoothing, soft targets, a prior, a margin, z-loss and the comp-sum
// family. Symbols of one row with target y, f the element map (Prieto et al., arXiv 2501.04697):
//   z_k = t x_k + margin [k != y],  e_k = pi_k f(z_k) (softmax: exp(z_k + ln pi_k - m)),  rho = f'/f
//   R = sum of e_k over k != y,  S = R + e_y,  p_k = e_k / S,  ln S = m + log S,  g_k = ln (pi_k f)
//   u_k: eps w_k / V', or w_k ((1 - eps) q_k + eps / V') with soft targets q;  U = sum of u_k
//   l = log1p(R / e_y),  c(l) = l, or expm1((1 - tau) l) / (1 - tau),  phi = c'(l)
//   loss = (1 - eps) w_y c(l) + sum u_k (ln S - g_k) + kappa (ln S)^2
//   dx_k = t rho_k {[(1 - eps) w_y phi + U + 2 kappa ln S] p_k - u_k},  for k = y the first term is
//          -(1 - eps) w_y phi R / S: no difference of close numbers is ever formed
// Bytes a logit of b bytes: forward b, both 2 b, backward 2 b (+ b with soft targets).
//
// Exactness: elements are mapped in float32 (float64 for float64 logits) and summed in fixed lanes
// that are added up in float64, in an order that depends on the number of classes alone: the same
// bits for every level, number of threads and layout.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowloss_columns.h"
#include "cpu/rowloss_rows.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// Whether the lanes of a vector are rows (rowloss_columns.h) and not classes (rowloss_rows.h).
static bool by_columns(const RowLossArgs& a) {
  return a.classes <= COLUMNS || a.class_stride != 1 || (a.grad && a.grad_class_stride != 1);
}

static int64_t thread_scratch(const RowLossArgs& a) {
  return whole_lines(by_columns(a) ? columns_scratch(a) : rows_scratch(a));
}
static int64_t scratch(const RowLossArgs& a) { return a.threads * thread_scratch(a); }

template <int D>
static void visit(const RowLossArgs& a, int mode) {
  char* const memory = static_cast<char*>(a.scratch);
  const bool columns = by_columns(a);
  if (!columns && a.rows < a.threads && row_blocks(a) > 1) {
    rows_visit<D>(a, mode, -1, 0, memory);
    return;
  }
  const int64_t bytes = thread_scratch(a);
  for_ranges(a.rows, a.threads, [&](int64_t thread, int64_t first, int64_t end) {
    if (columns)
      columns_visit<D>(a, mode, first, end - first, memory + bytes * thread);
    else
      rows_visit<D>(a, mode, first, end, memory + bytes * thread);
  });
}

template <int MODE>
static void visit_dtype(const RowLossArgs& a) {
  switch (a.dtype) {
    case F64:
      return visit<F64>(a, MODE);
    case F32:
      return visit<F32>(a, MODE);
    case F16:
      return visit<F16>(a, MODE);
    default:
      return visit<BF16>(a, MODE);
  }
}

// Rows that count, if all of their labels are classes; else -1. Without branches, for vectors.
template <class Label>
static int64_t count_good(const RowTargetsArgs& a) {
  const Label* const labels = static_cast<const Label*>(a.labels);
  int64_t count = 0;
  uint64_t bad = 0;
  if (a.valid)
    for (int64_t i = 0; i < a.rows; ++i) {
      const uint64_t counts = a.valid[i] != 0;
      count += int64_t(counts);
      bad |= counts & (uint64_t(int64_t(labels[i]) - a.label_offset) >= uint64_t(a.classes));
    }
  else
    for (int64_t i = 0; i < a.rows; ++i) {
      const int64_t y = labels[i];
      const uint64_t counts = y != a.ignore_index;
      count += int64_t(counts);
      bad |= counts & (uint64_t(y - a.label_offset) >= uint64_t(a.classes));
    }
  return bad ? -1 : count;
}

static RowTargets targets(const RowTargetsArgs& a) {
  if (!a.weight && !a.prior) {
    const int64_t count = a.label_bytes == 4 ? count_good<int32_t>(a) : count_good<int64_t>(a);
    if (count >= 0) return RowTargets{count, double(count), -1};
  }
  RowTargets found{0, 0.0, -1};
  const auto number = [&](const void* p, int64_t k) {
    return a.is_float64 ? static_cast<const double*>(p)[k] : double(static_cast<const float*>(p)[k]);
  };
  const double masked = a.prior_is_log ? -__builtin_inf() : 0.0;
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t y = row_label(a.labels, a.label_bytes, i);
    if (a.valid ? a.valid[i] == 0 : y == a.ignore_index) continue;
    ++found.count;
    const int64_t k = y - a.label_offset;
    if (k < 0 || k >= a.classes || (a.prior && number(a.prior, k) == masked)) {
      if (found.first_bad < 0) found.first_bad = i;
      if (k < 0 || k >= a.classes) continue;
    }
    if (a.weight) found.weight_total += number(a.weight, k);
  }
  if (!a.weight) found.weight_total = double(found.count);
  return found;
}

}  // namespace FLCORE_ISA

extern const RowLossFns FLCORE_TABLE(rowloss);
const RowLossFns FLCORE_TABLE(rowloss) = {
    &FLCORE_ISA::visit_dtype<FLCORE_ISA::ROW_FORWARD>, &FLCORE_ISA::visit_dtype<FLCORE_ISA::ROW_BOTH>,
    &FLCORE_ISA::visit_dtype<FLCORE_ISA::ROW_BACKWARD>, &FLCORE_ISA::scratch,
    &FLCORE_ISA::targets};

}  // namespace flcore
