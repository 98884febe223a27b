// Order of the passes of PowerSGD and what is O(n + m) in it. P is orthonormal in float64, rounded to
// the packet's dtype, and only then multiplied with U, so that Q fits the P that a receiver has.
// Nothing is written to a state before all of U and both factors were found finite.
#include "low_rank.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"

namespace flcore {
namespace {

int64_t cut(int64_t length, int64_t part) { return (length + part - 1) / part; }

bool finite(const double* x, int64_t n) {
  return std::all_of(x, x + n, [](double v) { return std::isfinite(v); });
}

// Nearest even; what would become infinite becomes the largest bfloat16.
uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t raw = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  return (raw & 0x7fffu) == 0x7f80u && std::isfinite(x) ? uint16_t(raw - 1) : raw;
}

float from_bfloat16(uint16_t raw) {
  const uint32_t bits = uint32_t(raw) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// values as the wire has them, and as a receiver reads them
void round_values(float* x, int64_t n, int dtype, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == BF16) {
      const uint16_t raw = to_bfloat16(x[i]);
      std::memcpy(out + 2 * i, &raw, 2);
      x[i] = from_bfloat16(raw);
    } else {
      std::memcpy(out + 4 * i, x + i, 4);
    }
  }
}

// [rank][n] in float64 to [n][rank] in float32
void columns_to_rows(const LowRankLayer& l, const double* from, float* to) {
  for (int64_t i = 0; i < l.n; ++i)
    for (int64_t k = 0; k < l.rank; ++k) to[i * l.rank + k] = float(from[k * l.n + i]);
}

// The largest |D| that factors can give; not a number when one is not.
double reach(const LowRankPlan& plan, const float* p, const float* q) {
  double most = 0;
  for (const LowRankLayer& l : plan.layers) {
    double sum = 0;
    for (int64_t k = 0; k < l.rank; ++k) {
      double rows = 0, columns = 0;
      for (int64_t i = 0; i < l.n; ++i)
        rows = std::max(rows, std::fabs(double(p[l.p + i * l.rank + k])));
      for (int64_t j = 0; j < l.m; ++j)
        columns = std::max(columns, std::fabs(double(q[l.q + k * l.m + j])));
      sum += rows * columns;
    }
    most = std::max(most, sum);
  }
  return most;
}

float greatest(const std::vector<float>& x) {
  return x.empty() ? 0.0f : *std::max_element(x.begin(), x.end());
}

}  // namespace

LowRankPlan::LowRankPlan(const std::vector<int64_t>& numel, const std::vector<int64_t>& n,
                         const std::vector<int64_t>& m, const std::vector<int64_t>& rank) {
  const size_t count = numel.size();
  FLCORE_CHECK(n.size() == count && m.size() == count && rank.size() == count,
               "shapes: expected ", count, " rows, columns and ranks");
  first_tile.push_back(0);
  first_column.push_back(0);
  for (size_t i = 0; i < count; ++i) {
    LowRankLayer l{this->numel, n[i], m[i], rank[i], p, q, values};
    FLCORE_CHECK(l.rank >= 0 && l.rank <= LOW_RANK_MAX, "rank[", i, "]: expected 0 to ",
                 LOW_RANK_MAX, ", got ", l.rank);
    if (l.rank == 0) {
      l.n = 1;
      l.m = numel[i];
    }
    FLCORE_CHECK(l.n >= 0 && l.m >= 0 && (l.m == 0 || l.n == numel[i] / l.m) &&
                     l.n * l.m == numel[i] && l.rank <= std::min(l.n, l.m),
                 "shapes[", i, "]: expected ", numel[i], " values and a rank up to both sides, got ",
                 l.n, " x ", l.m, " of rank ", l.rank);
    layers.push_back(l);
    const int64_t columns = cut(l.m, LOW_RANK_COLUMNS), rows = cut(l.n, LOW_RANK_ROWS);
    this->numel += numel[i];
    p += l.n * l.rank;
    q += l.m * l.rank;
    values += l.rank ? 0 : numel[i];
    first_tile.push_back(first_tile.back() + rows * columns);
    first_column.push_back(first_column.back() + columns);
    first_row_sum.push_back(row_sums);
    column_sums += columns * l.n * l.rank;
    row_sums += rows * l.rank * l.m;
  }
}

LowRankArgs LowRankPlan::args(const FeedbackArgs& feedback) const {
  LowRankArgs x;
  x.feedback = &feedback;
  x.layers = int64_t(layers.size());
  x.layer = layers.data();
  x.first_tile = first_tile.data();
  x.first_column = first_column.data();
  x.keep = false;
  x.value_dtype = F32;
  x.values = nullptr;
  return x;
}

void low_rank_orthonormalise(const LowRankPlan& plan, bool columns, const float* in, float* out,
                             int threads) {
  FeedbackArgs none{};
  none.threads = threads;
  const int64_t size = columns ? plan.q : plan.p;
  std::vector<double> work(static_cast<size_t>(size));
  for (const LowRankLayer& l : plan.layers)
    for (int64_t k = 0; k < l.rank; ++k) {
      if (columns)
        for (int64_t j = 0; j < l.m; ++j)
          work[size_t(l.q + k * l.m + j)] = double(in[l.q + k * l.m + j]);
      else
        for (int64_t i = 0; i < l.n; ++i)
          work[size_t(l.p + k * l.n + i)] = double(in[l.p + i * l.rank + k]);
    }
  cpu().low_rank->orthonormalise(plan.args(none), columns, work.data());
  if (columns) {
    std::copy(work.begin(), work.end(), out);
    return;
  }
  for (const LowRankLayer& l : plan.layers) columns_to_rows(l, work.data() + l.p, out + l.p);
}

bool low_rank(const FeedbackArgs& feedback, const LowRankPlan& plan, const LowRankPacket& packet) {
  const LowRankFns& run = *cpu().low_rank;
  LowRankArgs x = plan.args(feedback);
  x.value_dtype = packet.value_dtype;
  x.values = packet.values;
  std::vector<float> p(size_t(plan.p)), q(size_t(plan.q)), top(size_t(plan.first_tile.back()));
  std::vector<double> wide(size_t(std::max(plan.p, plan.q)));

  low_rank_orthonormalise(plan, true, packet.start, q.data(), feedback.threads);
  {
    std::vector<double> partial(size_t(plan.column_sums));
    run.project(x, q.data(), partial.data(), top.data());
    run.sum_columns(x, partial.data(), wide.data());
  }
  const double most = greatest(top);
  if (!std::isfinite(most) || !finite(wide.data(), plan.p)) return false;
  run.orthonormalise(x, false, wide.data());
  for (const LowRankLayer& l : plan.layers) columns_to_rows(l, wide.data() + l.p, p.data() + l.p);
  round_values(p.data(), plan.p, packet.value_dtype, packet.p);
  {
    std::vector<float> partial(size_t(plan.row_sums));
    run.back(x, p.data(), plan.first_row_sum.data(), partial.data(), nullptr);
    run.sum_rows(x, partial.data(), plan.first_row_sum.data(), wide.data());
  }
  if (!finite(wide.data(), plan.q)) return false;
  std::copy(wide.begin(), wide.begin() + plan.q, q.begin());
  round_values(q.data(), plan.q, packet.value_dtype, packet.q);
  if (!(most + reach(plan, p.data(), q.data()) <= LOW_RANK_LARGEST)) return false;
  run.apply(x, p.data(), q.data());
  std::copy(q.begin(), q.end(), packet.next);
  return true;
}

bool low_rank_half(const FeedbackArgs& feedback, const LowRankPlan& plan, bool back,
                   const float* factor, float* product, float* values) {
  const LowRankFns& run = *cpu().low_rank;
  LowRankArgs x = plan.args(feedback);
  x.keep = true;
  x.values = reinterpret_cast<uint8_t*>(values);
  std::vector<float> top(size_t(plan.first_tile.back()));
  std::vector<double> wide(size_t(back ? plan.q : plan.p));
  if (back) {
    std::vector<float> partial(size_t(plan.row_sums));
    run.back(x, factor, plan.first_row_sum.data(), partial.data(), top.data());
    run.sum_rows(x, partial.data(), plan.first_row_sum.data(), wide.data());
    std::copy(wide.begin(), wide.end(), product);
  } else {
    std::vector<double> partial(size_t(plan.column_sums));
    run.project(x, factor, partial.data(), top.data());
    run.sum_columns(x, partial.data(), wide.data());
    for (const LowRankLayer& l : plan.layers) columns_to_rows(l, wide.data() + l.p, product + l.p);
  }
  return std::isfinite(greatest(top)) &&
         std::all_of(product, product + wide.size(), [](float v) { return std::isfinite(v); });
}

void low_rank_residual(const LowRankPlan& plan, const float* p, const float* q, const float* e,
                       float* e_new, int threads) {
  const int64_t starts[] = {0, plan.numel};
  const int dtype = F32;
  const void* const grads[] = {e};
  FeedbackArgs feedback{};
  feedback.numel = plan.numel;
  feedback.layers = 1;
  feedback.starts = starts;
  feedback.dtype = &dtype;
  feedback.grads = grads;
  feedback.e_new = e_new;
  feedback.state_dtype = F32;
  feedback.threads = threads;
  cpu().low_rank->apply(plan.args(feedback), p, q);
}

}  // namespace flcore
