// Weighted sums of client rows over one tile, in float32, float64 or reproducible bins; what
// combine.isa.cpp makes of them is told there.
//
// Every sum runs in client order, the product rounded, then the sum: no fused multiply-add, element
// by element, so the vector width does not show. float32 products of 16-bit and 8-bit inputs are
// formed in float32. Reproducible sums: float64 products are cut on an absolute grid of three bins
// (BIN_UNIT); sums of multiples of one unit are exact, so that neither order nor grouping changes a
// bit (pre-rounding as in Demmel & Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013).
#pragma once

#include "api.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t TILE_BINS = 1024;  // coordinates of a tile of bins; three float64 each

// The rows of one sum over one layer: row i lies at x[at(i) * stride], with weight w[i * w_stride].
struct Rows {
  const void* const* x;
  int64_t stride;
  const int64_t* index;  // the rows that take part; null: 0, 1, ...
  const double* w;
  int64_t w_stride;
  int64_t n;

  const void* row(int64_t i) const { return x[(index ? index[i] : i) * stride]; }
  double weight(int64_t i) const { return w[i * w_stride]; }
};

static inline Rows rows_of(const CombineArgs& a, int64_t layer) {
  return Rows{a.rows + layer,       a.layers, nullptr, a.by_layer ? a.weights + layer : a.weights,
              a.by_layer ? a.layers : 1, a.n};
}

// ---- float32 accumulators ----------------------------------------------------------------------

// R rows at once; `fresh` starts from the first product (so that 1 * x is x, the sign of 0 included).
// DIFF: the rows are models, of which the sum takes x - base.
template <int D, int R, bool DIFF>
FLCORE_NOINLINE static void add_group(const void* const* x, const double* w, int64_t offset, const float* base,
                      float* acc, int64_t m, bool fresh) {
  const void* p[R];
  float wr[R];
  for (int r = 0; r < R; ++r) {
    p[r] = x[r];
    wr[r] = float(w[r]);
  }
  int64_t i = 0;
  for (; i + 2 * LANES <= m; i += 2 * LANES) {
    vf32 base_a = {}, base_b = {};
    if constexpr (DIFF) {
      base_a = load<vf32>(base + i);
      base_b = load<vf32>(base + i + LANES);
    }
#define FLCORE_TERM(r, shift, from) \
  (DIFF ? wr[r] * (load_f32<D>(p[r], offset + i + shift) - from) \
        : wr[r] * load_f32<D>(p[r], offset + i + shift))
    const vf32 first = FLCORE_TERM(0, 0, base_a);
    const vf32 second = FLCORE_TERM(0, LANES, base_b);
    vf32 a = fresh ? first : load<vf32>(acc + i) + first;
    vf32 b = fresh ? second : load<vf32>(acc + i + LANES) + second;
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) {
      a = a + FLCORE_TERM(r, 0, base_a);
      b = b + FLCORE_TERM(r, LANES, base_b);
    }
#undef FLCORE_TERM
    store(acc + i, a);
    store(acc + i + LANES, b);
  }
#define FLCORE_TERM(r) (wr[r] * (load1<D>(p[r], offset + i) - (DIFF ? base[i] : 0)))
  for (; i < m; ++i) {
    float a = fresh ? FLCORE_TERM(0) : acc[i] + FLCORE_TERM(0);
    for (int r = 1; r < R; ++r) a = a + FLCORE_TERM(r);
    acc[i] = a;
  }
#undef FLCORE_TERM
}

// ---- float64 accumulators ----------------------------------------------------------------------

template <int D, int R, bool DIFF>
FLCORE_NOINLINE static void add_group(const void* const* x, const double* w, int64_t offset, const double* base,
                      double* acc, int64_t m, bool fresh) {
  const void* p[R];
  double wr[R];
  for (int r = 0; r < R; ++r) {
    p[r] = x[r];
    wr[r] = w[r];
  }
  int64_t i = 0;
#define FLCORE_TERM(r) \
  (DIFF ? wr[r] * (load_f64<D>(p[r], offset + i) - start) : wr[r] * load_f64<D>(p[r], offset + i))
  for (; i + LANES64 <= m; i += LANES64) {
    vf64 start = {};
    if constexpr (DIFF) start = load<vf64>(base + i);
    const vf64 first = FLCORE_TERM(0);
    vf64 a = fresh ? first : load<vf64>(acc + i) + first;
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) a = a + FLCORE_TERM(r);
    store(acc + i, a);
  }
#undef FLCORE_TERM
#define FLCORE_TERM(r) (wr[r] * (load1_f64<D>(p[r], offset + i) - (DIFF ? base[i] : 0)))
  for (; i < m; ++i) {
    double a = fresh ? FLCORE_TERM(0) : acc[i] + FLCORE_TERM(0);
    for (int r = 1; r < R; ++r) a = a + FLCORE_TERM(r);
    acc[i] = a;
  }
#undef FLCORE_TERM
}

// All rows of one tile, eight at a time and the rest four, two or one at a time (models only one at
// a time: half the code). `fresh`: acc holds nothing yet; without rows it becomes 0.
template <int D, class Acc, bool DIFF = false>
static void add_rows(const Rows& rows, int64_t offset, Acc* acc, int64_t m, bool fresh,
                     const Acc* base = nullptr) {
  if (rows.n == 0 && fresh) __builtin_memset(acc, 0, size_t(m) * sizeof(Acc));
  int64_t i = 0;
#define FLCORE_ROWS(R)                                                \
  for (; rows.n - i >= R; i += R, fresh = false) {                    \
    const void* x[R];                                                 \
    double w[R];                                                      \
    for (int r = 0; r < R; ++r) {                                     \
      x[r] = rows.row(i + r);                                         \
      w[r] = rows.weight(i + r);                                      \
    }                                                                 \
    add_group<D, R, DIFF>(x, w, offset, base, acc, m, fresh);         \
  }
  FLCORE_ROWS(8)
  if constexpr (!DIFF) {
    FLCORE_ROWS(4)
    FLCORE_ROWS(2)
  }
  FLCORE_ROWS(1)
#undef FLCORE_ROWS
}

// ---- reproducible: three float64 bins ----------------------------------------------------------

// p = q0 + q1 + q2 + rest: multiples of the three units, |rest| <= unit 2 / 2 is dropped. Returns
// whether a product was out of range or NaN.
template <int D>
static bool add_row_bins(const void* x, double w, int64_t offset, const double* base, double* acc,
                         int64_t m) {
  const double cut0 = 1.5 * 0x1p52 * BIN_UNIT[0], cut1 = 1.5 * 0x1p52 * BIN_UNIT[1],
               cut2 = 1.5 * 0x1p52 * BIN_UNIT[2];
  double *b0 = acc, *b1 = acc + TILE_BINS, *b2 = acc + 2 * TILE_BINS;
  vi64 bad = {};
  int64_t i = 0;
#define FLCORE_DEPOSIT(V, P, LOAD, STORE)          \
  const V q0 = (P + cut0) - cut0, r0 = P - q0;     \
  const V q1 = (r0 + cut1) - cut1, r1 = r0 - q1;   \
  const V q2 = (r1 + cut2) - cut2;                 \
  STORE(b0, LOAD(b0) + q0);                        \
  STORE(b1, LOAD(b1) + q1);                        \
  STORE(b2, LOAD(b2) + q2)
#define FLCORE_VLOAD(b) load<vf64>(b + i)
#define FLCORE_VSTORE(b, v) store(b + i, v)
  for (; i + LANES64 <= m; i += LANES64) {
    vf64 v = load_f64<D>(x, offset + i);
    if (base) v = v - load<vf64>(base + i);
    const vf64 p = w * v;
    bad |= ~((p < BIN_LIMIT) & (p > -BIN_LIMIT));  // true for NaN too
    FLCORE_DEPOSIT(vf64, p, FLCORE_VLOAD, FLCORE_VSTORE);
  }
#define FLCORE_SLOAD(b) b[i]
#define FLCORE_SSTORE(b, v) b[i] = v
  bool any = false;
  for (; i < m; ++i) {
    double v = load1_f64<D>(x, offset + i);
    if (base) v = v - base[i];
    const double p = w * v;
    any |= !(p < BIN_LIMIT && p > -BIN_LIMIT);
    FLCORE_DEPOSIT(double, p, FLCORE_SLOAD, FLCORE_SSTORE);
  }
#undef FLCORE_DEPOSIT
#undef FLCORE_VLOAD
#undef FLCORE_VSTORE
#undef FLCORE_SLOAD
#undef FLCORE_SSTORE
  for (int k = 0; k < LANES64; ++k) any |= bad[k] != 0;
  return any;
}

template <int D>
FLCORE_NOINLINE static bool add_rows_bins(const Rows& rows, int64_t offset, double* acc, int64_t m,
                          const double* base = nullptr) {
  bool range = false;
  for (int64_t i = 0; i < rows.n; ++i)
    range |= add_row_bins<D>(rows.row(i), rows.weight(i), offset, base, acc, m);
  return range;
}

static inline void join_bins(double* acc, int64_t m) {
  for (int64_t i = 0; i < m; ++i)
    acc[i] = (acc[i] + acc[TILE_BINS + i]) + acc[2 * TILE_BINS + i];
}

// ---- finished sums -----------------------------------------------------------------------------

// x * 0 is 0 for finite x, NaN otherwise; four sums hide the latency of the adder
template <class Acc, class Vec>
static int finite_flag(const Acc* acc, int64_t m) {
  constexpr int64_t WIDTH = int64_t(sizeof(Vec) / sizeof(Acc));
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * WIDTH <= m; i += 4 * WIDTH)
    for (int k = 0; k < 4; ++k) sum[k] += load<Vec>(acc + i + k * WIDTH) * Acc(0);
  Acc rest = 0;
  for (; i < m; ++i) rest += acc[i] * Acc(0);
  const Vec all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (int k = 0; k < WIDTH; ++k) rest += all[k];
  return rest == 0 ? 0 : COMBINE_NONFINITE;
}

static inline int finite_flag(const float* acc, int64_t m) {
  return finite_flag<float, vf32>(acc, m);
}
static inline int finite_flag(const double* acc, int64_t m) {
  return finite_flag<double, vf64>(acc, m);
}

template <int D, class Acc>
FLCORE_NOINLINE static void write_out(const Acc* acc, int64_t m, double divisor, void* out, int64_t offset) {
  if (divisor == 1.0)
    for (int64_t i = 0; i < m; ++i) store1<D>(out, offset + i, acc[i]);
  else if (sizeof(Acc) == 4)  // one rounding to float32, so that casting twice changes nothing
    for (int64_t i = 0; i < m; ++i)
      store1<D>(out, offset + i, float(double(acc[i]) / divisor));
  else
    for (int64_t i = 0; i < m; ++i) store1<D>(out, offset + i, double(acc[i]) / divisor);
}

template <class Acc>
static void write_out(int dtype, const Acc* acc, int64_t m, double divisor, void* out,
                      int64_t offset) {
  switch (dtype) {
    case F64: write_out<F64>(acc, m, divisor, out, offset); break;
    case F32: write_out<F32>(acc, m, divisor, out, offset); break;
    case F16: write_out<F16>(acc, m, divisor, out, offset); break;
    default: write_out<BF16>(acc, m, divisor, out, offset); break;
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
