// StableMax of rows and its logarithm, forward and backward, along any dimension (Prieto, Barsbey,
// Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697):
//   s(x) = a for x >= 0, 1/a below, a = 1 + |x|;  p_k = s_k / S;  r = 1 / a
//   VJP of p:     dx_k = p_k (v_k - sum_i v_i p_i) r_k = (s'_k / S) ((v_k - c) + q)
//   VJP of log p: dx_k = (v_k - p_k sum_i v_i) r_k
//
// A first visit sums s over all but the largest value m of the row, R, so that what is left when
// one class takes all is not the difference of close numbers: log p_m = -log1p(R / s_m). Beyond
// p_m = 1/2 the row of a VJP is measured from v_m: c = v_m, q = (v_m R - sum_{i != m} v_i s_i) / S.
// The other logarithms are those of quotients: |x| <= 1e38 stays in range.
//
// Rows whose classes lie side by side are summed in 16 lanes (float64: 8), blocks of BLOCK in
// double; where rows lie side by side, or are short and then turned, each has a lane of its own.
// Both visits go over the same fixed blocks, so neither level nor threads change a bit. float16 and
// bfloat16 pass through a block of float32.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/collapse.h"
#include "cpu/isa.h"
#include "cpu/rowmap.h"
#include "cpu/value_blocks.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t COLUMN_BLOCK = 256;    // rows that go side by side
constexpr int64_t COLUMN_TERMS = 32;     // a lane adds up before it is flushed to double
constexpr int64_t TASK_VALUES = 1 << 14;  // values of short rows that one thread takes at once
constexpr int64_t SHORT = 64, SHORT_VALUES = 4096;  // classes of short rows; values of a tile
constexpr int CONSTANTS = 5;             // of a row, for `emit`

// ---- sums ---------------------------------------------------------------------------------------

// What a lane knows of its values so far.
template <class V>
struct Sums {
  V top, rest;      // the largest; s of the others
  V top_v, rest_v;  // v of the largest; v s (VJP of p) or v (of log p) of the others
};

template <int STEP, class V>
FLCORE_INLINE void absorb(Sums<V>& a, const V& z, const V& v) {
  const auto up = z > a.top;  // false for NaN, which the sum then takes
  V s, d;
  row_map<ROW_STABLEMAX>(up ? a.top : z, V{}, V{}, s, d);
  a.rest += s;
  a.top = up ? z : a.top;
  if constexpr (STEP == STABLEMAX_BACKWARD || STEP == STABLEMAX_LOG_BACKWARD) {
    const V low = up ? a.top_v : v;
    a.rest_v += STEP == STABLEMAX_BACKWARD ? low * s : low;
    a.top_v = up ? v : a.top_v;
  }
}

// n values, a multiple of the lanes, into lanes: top and top_v go on, rest and rest_v are added to
// doubles at the end.
template <int STEP, class V>
FLCORE_NOINLINE static void absorb_block(const typename Real<V>::T* z, const typename Real<V>::T* v,
                                         int64_t n, Sums<double*> lane) {
  typedef typename Real<V>::T T;
  constexpr int WIDTH = Real<V>::WIDTH, COUNT = 64 / int(sizeof(T));
  for (int first = 0; first < COUNT; first += WIDTH) {
    T top[WIDTH], top_v[WIDTH], rest[WIDTH], rest_v[WIDTH];
    for (int k = 0; k < WIDTH; ++k) {
      top[k] = T(lane.top[first + k]);
      top_v[k] = T(lane.top_v[first + k]);
    }
    Sums<V> a{load<V>(top), V{}, load<V>(top_v), V{}};
    for (int64_t i = first; i < n; i += COUNT)
      absorb<STEP>(a, load<V>(z + i), STEP >= STABLEMAX_BACKWARD ? load<V>(v + i) : V{});
    store(top, a.top);
    store(top_v, a.top_v);
    store(rest, a.rest);
    store(rest_v, a.rest_v);
    for (int k = 0; k < WIDTH; ++k) {
      lane.top[first + k] = double(top[k]);
      lane.top_v[first + k] = double(top_v[k]);
      lane.rest[first + k] += double(rest[k]);
      lane.rest_v[first + k] += double(rest_v[k]);
    }
  }
}

// One value more for each of n rows.
template <int STEP, class V>
FLCORE_NOINLINE static void absorb_columns(const typename Real<V>::T* z,
                                           const typename Real<V>::T* v, int64_t n,
                                           Sums<typename Real<V>::T*> row) {
  for (int64_t j = 0; j < n; j += Real<V>::WIDTH) {
    Sums<V> a{load<V>(row.top + j), load<V>(row.rest + j), load<V>(row.top_v + j),
              load<V>(row.rest_v + j)};
    absorb<STEP>(a, load<V>(z + j), STEP >= STABLEMAX_BACKWARD ? load<V>(v + j) : V{});
    store(row.top + j, a.top);
    store(row.rest + j, a.rest);
    if constexpr (STEP >= STABLEMAX_BACKWARD) {
      store(row.top_v + j, a.top_v);
      store(row.rest_v + j, a.rest_v);
    }
  }
}

// Lanes of a row to lane 0, in a tree; the arrays have LANES64 entries more.
template <int STEP>
static void join_lanes(Sums<double*> lane, int count) {
  for (int width = count / 2; width > 0; width /= 2)
    for (int k = 0; k < width; k += LANES64) {
      const int b = k + width;
      Sums<vf64> a{load<vf64>(lane.top + k), load<vf64>(lane.rest + k) + load<vf64>(lane.rest + b),
                   load<vf64>(lane.top_v + k),
                   load<vf64>(lane.rest_v + k) + load<vf64>(lane.rest_v + b)};
      absorb<STEP>(a, load<vf64>(lane.top + b), load<vf64>(lane.top_v + b));
      store(lane.top + k, a.top);
      store(lane.rest + k, a.rest);
      store(lane.top_v + k, a.top_v);
      store(lane.rest_v + k, a.rest_v);
    }
}

// ---- from the sums of LANES64 rows to their constants ------------------------------------------

FLCORE_NOINLINE static void finish(int step, const Sums<vf64>& a, vf64* out) {
  const vf64 nan = splat<vf64>(__builtin_nan("")), one = splat<vf64>(1);
  const vf64 size = vabs(a.top) + 1, own = a.top >= 0.0 ? size : 1 / size;
  const vf64 total = own + a.rest;
  const auto good = (total > 0.0) & (total < __builtin_inf());
  if (step == STABLEMAX_LOG) {
    // total = 2^e m with 1 <= m < 2; from what is not normal it is lifted
    const auto low = total < 0x1p-1022;
    const vu64 bits = (vu64)(low ? total * 0x1p54 : total);
    const vu64 below = ((vu64{} + 1) << 52) - 1;
    const vf64 m = (vf64)((bits & below) | (vu64)one);
    const vf64 e = ((vf64)((bits >> 52) + (vu64)splat<vf64>(0x1p52)) - (0x1p52 + 1023)) -
                   (low ? splat<vf64>(54) : vf64{});
    out[0] = 1 / m;
    out[1] = m * 0.5;
    out[2] = good ? e : nan;
    out[3] = a.top;
    out[4] = good ? vf64{} - row_log1p(a.rest / own) : nan;
    return;
  }
  // s times 1 / total in two steps, neither beyond the range of float32
  const vf64 shrink = total > 0x1p100 ? splat<vf64>(0x1p-64) : one;
  const vf64 inverse = good ? 1 / total : nan;
  out[0] = shrink;
  out[1] = inverse / shrink;
  const auto leads = own > a.rest;
  if (step == STABLEMAX_BACKWARD) {
    out[2] = leads ? a.top_v : vf64{};
    out[3] = (leads ? a.top_v * a.rest - a.rest_v : vf64{} - (a.rest_v + a.top_v * own)) * inverse;
  } else {
    out[2] = a.rest_v + a.top_v;
    out[3] = leads & good ? a.top : nan;  // which no value equals
    out[4] = (a.top_v * a.rest - own * a.rest_v) * inverse / size;
  }
}

// ---- results ------------------------------------------------------------------------------------

template <int STEP, class V>
FLCORE_INLINE V emit(const V& z, const V& v, const V* k) {
  typedef typename Real<V>::T T;
  if constexpr (STEP == STABLEMAX_LOG) {
    const auto up = z >= V{};
    const V w = (vabs(z) + 1) * (up ? k[0] : k[1]);
    const V y = log_parts<false>(w, V{}, up ? -k[2] : k[2] + 1);
    const V masked = k[2] - T(__builtin_inf());  // -inf, NaN in a row of NaN
    const V other = z == splat<V>(T(-__builtin_inf())) ? masked : up ? y : -y;
    return z == k[3] ? k[4] : other;
  } else {
    V s, d;
    row_map<ROW_STABLEMAX>(z, V{}, V{}, s, d);
    if constexpr (STEP == STABLEMAX_FORWARD) return (s * k[0]) * k[1];
    if constexpr (STEP == STABLEMAX_BACKWARD) return ((d * k[0]) * k[1]) * ((v - k[2]) + k[3]);
    const V other = (v - ((s * k[0]) * k[1]) * k[2]) * row_rho<ROW_STABLEMAX>(z);
    return z == k[3] ? k[4] : other;
  }
}

// Constant c of value j is k[c * pitch + j * along]: along 0, one row; 1, a row each.
template <int STEP, class V>
FLCORE_NOINLINE static void emit_block(const typename Real<V>::T* z, const typename Real<V>::T* v,
                                       const typename Real<V>::T* k, int64_t pitch, int64_t along,
                                       int64_t n, typename Real<V>::T* out) {
  for (int64_t j = 0; j < n; j += Real<V>::WIDTH) {
    V c[CONSTANTS];
    for (int i = 0; i < CONSTANTS; ++i) c[i] = load<V>(k + i * pitch + j * along);
    const V up = STEP >= STABLEMAX_BACKWARD ? load<V>(v + j) : V{};
    store(out + j, emit<STEP>(load<V>(z + j), up, c));
  }
}

// ---- rows ---------------------------------------------------------------------------------------

template <int STEP, class V>
static void one_row(const StableMaxArgs& a, int64_t row) {
  typedef typename Real<V>::T T;
  constexpr int COUNT = 64 / int(sizeof(T));
  const int64_t o = row / a.inner, i = row % a.inner;
  const int64_t x_at = o * a.x.outer + i * a.x.row, v_at = o * a.v.outer + i * a.v.row;
  const int64_t out_at = o * a.out.outer + i * a.out.row;
  double top[COUNT + LANES64], rest[COUNT + LANES64] = {}, top_v[COUNT + LANES64] = {},
      rest_v[COUNT + LANES64] = {};
  for (double& t : top) t = -__builtin_inf();
  const Sums<double*> lane{top, rest, top_v, rest_v};
  T z_block[BLOCK], v_block[BLOCK], out_block[BLOCK], k[CONSTANTS * COUNT];
  const T *z = nullptr, *v = nullptr;
  const int64_t blocks = (a.classes + BLOCK - 1) / BLOCK;
  const auto length = [&](int64_t b) {
    return b + 1 < blocks ? BLOCK : a.classes - (blocks - 1) * BLOCK;
  };
  const auto fetch = [&](int64_t b) {
    z = fetch_block(a.dtype, a.x.data, x_at + b * BLOCK, length(b), z_block, T(-__builtin_inf()));
    if (STEP >= STABLEMAX_BACKWARD)
      v = fetch_block(a.dtype, a.v.data, v_at + b * BLOCK, length(b), v_block, T(0));
  };
  for (int64_t b = 0; b < blocks; ++b) {
    fetch(b);
    absorb_block<STEP, V>(z, v, padded<T>(length(b)), lane);
  }
  join_lanes<STEP>(lane, COUNT);
  vf64 constants[CONSTANTS] = {};
  finish(STEP, {splat<vf64>(top[0]), splat<vf64>(rest[0]), splat<vf64>(top_v[0]),
                splat<vf64>(rest_v[0])}, constants);
  for (int c = 0; c < CONSTANTS; ++c)
    for (int j = 0; j < COUNT; ++j) k[c * COUNT + j] = T(constants[c][0]);
  for (int64_t b = blocks; b-- > 0;) {  // backwards: the last blocks are in cache
    if (b + 1 < blocks) fetch(b);
    const Place<T> to = place_block(a.dtype, a.out.data, out_at + b * BLOCK, length(b), out_block);
    emit_block<STEP, V>(z, v, k, COUNT, 0, padded<T>(length(b)), to.values);
    to.deliver();
  }
}

// `width` rows in lanes of their own: fetch(c, z, v) points to their values of class c, and
// put(c, emit) hands emit(out) the place of their results.
template <int STEP, class V, class Fetch, class Put>
static void visit_columns(int64_t classes, int64_t width, const Fetch& fetch, const Put& put) {
  typedef typename Real<V>::T T;
  constexpr int64_t SIZE = COLUMN_BLOCK;
  T top[SIZE], rest[SIZE] = {}, top_v[SIZE] = {}, rest_v[SIZE] = {}, k[CONSTANTS * SIZE];
  double rest_sum[SIZE] = {}, rest_v_sum[SIZE] = {};
  for (T& t : top) t = T(-__builtin_inf());
  const T *z = nullptr, *v = nullptr;
  for (int64_t c = 0; c < classes; ++c) {
    fetch(c, z, v);
    absorb_columns<STEP, V>(z, v, width, {top, rest, top_v, rest_v});
    if ((c + 1) % COLUMN_TERMS && c + 1 < classes) continue;
    for (int64_t j = 0; j < width; ++j) {
      rest_sum[j] += double(rest[j]);
      rest_v_sum[j] += double(rest_v[j]);
      rest[j] = rest_v[j] = 0;
    }
  }
  for (int64_t j = 0; j < width; j += LANES64) {
    vf64 tops, tops_v, constants[CONSTANTS] = {};
    for (int l = 0; l < LANES64; ++l) {
      tops[l] = double(top[j + l]);
      tops_v[l] = double(top_v[j + l]);
    }
    finish(STEP, {tops, load<vf64>(rest_sum + j), tops_v, load<vf64>(rest_v_sum + j)}, constants);
    for (int c = 0; c < CONSTANTS; ++c)
      for (int l = 0; l < LANES64; ++l) k[c * SIZE + j + l] = T(constants[c][l]);
  }
  for (int64_t c = classes; c-- > 0;) {
    if (c + 1 < classes) fetch(c, z, v);
    put(c, [&](T* out) { emit_block<STEP, V>(z, v, k, SIZE, 1, width, out); });
  }
}

// Rows first .. first + n - 1 of one outer index, side by side.
template <int STEP, class V>
static void some_columns(const StableMaxArgs& a, int64_t outer, int64_t first, int64_t n) {
  typedef typename Real<V>::T T;
  const int64_t x_at = outer * a.x.outer + first, v_at = outer * a.v.outer + first;
  const int64_t out_at = outer * a.out.outer + first;
  T z_block[COLUMN_BLOCK], v_block[COLUMN_BLOCK], out_block[COLUMN_BLOCK];
  visit_columns<STEP, V>(
      a.classes, padded<T>(n),
      [&](int64_t c, const T*& z, const T*& v) {
        z = fetch_block(a.dtype, a.x.data, x_at + c * a.x.cls, n, z_block, T(-__builtin_inf()));
        if (STEP >= STABLEMAX_BACKWARD)
          v = fetch_block(a.dtype, a.v.data, v_at + c * a.v.cls, n, v_block, T(0));
      },
      [&](int64_t c, const auto& emit) {
        const Place<T> to = place_block(a.dtype, a.out.data, out_at + c * a.out.cls, n, out_block);
        emit(to.values);
        to.deliver();
      });
}

template <class Data>
FLCORE_INLINE int64_t row_at(const RowPlace<Data>& place, int64_t inner, int64_t row) {
  return row / inner * place.outer + row % inner * place.row;
}

// The first `width` rows from `first` on, class c of row j at tile[c * width + j].
template <class T>
static void turn_rows(const StableMaxArgs& a, const RowPlace<const void>& from, int64_t first,
                      int64_t n, int64_t width, T* tile) {
  T block[SHORT + 16];
  for (int64_t j = 0; j < n; ++j) {
    const T* row = fetch_block(a.dtype, from.data, row_at(from, a.inner, first + j), a.classes,
                               block, T(0));
    for (int64_t c = 0; c < a.classes; ++c) tile[c * width + j] = row[c];
  }
  for (int64_t j = n; j < width; ++j)
    for (int64_t c = 0; c < a.classes; ++c) tile[c * width + j] = 0;
}

// n rows of few classes, turned so that each has a lane of its own.
template <int STEP, class V>
static void short_rows(const StableMaxArgs& a, int64_t first, int64_t n) {
  typedef typename Real<V>::T T;
  constexpr int64_t ROOM = SHORT_VALUES + SHORT * 16;
  const int64_t width = padded<T>(n);
  T x_tile[ROOM], v_tile[ROOM], out_tile[ROOM], block[SHORT + 16];
  turn_rows(a, a.x, first, n, width, x_tile);
  if (STEP >= STABLEMAX_BACKWARD) turn_rows(a, a.v, first, n, width, v_tile);
  visit_columns<STEP, V>(
      a.classes, width,
      [&](int64_t c, const T*& z, const T*& v) {
        z = x_tile + c * width;
        v = v_tile + c * width;
      },
      [&](int64_t c, const auto& emit) { emit(out_tile + c * width); });
  for (int64_t j = 0; j < n; ++j) {
    const int64_t at = row_at(a.out, a.inner, first + j);
    const Place<T> to = place_block(a.dtype, a.out.data, at, a.classes, block);
    for (int64_t c = 0; c < a.classes; ++c) to.values[c] = out_tile[c * width + j];
    to.deliver();
  }
}

template <int STEP, class V>
static void apply(const StableMaxArgs& a) {
  if (a.x.cls == 1 && a.classes <= SHORT) {
    const int64_t share = SHORT_VALUES / a.classes;
    const int64_t each = share < COLUMN_BLOCK ? share : COLUMN_BLOCK;
    for_chunks((a.rows + each - 1) / each, a.threads, [&](int64_t task) {
      const int64_t left = a.rows - task * each;
      short_rows<STEP, V>(a, task * each, left < each ? left : each);
    });
    return;
  }
  if (a.x.cls == 1) {
    const int64_t share = TASK_VALUES / a.classes, each = share < 1 ? 1 : share;
    for_chunks((a.rows + each - 1) / each, a.threads, [&](int64_t task) {
      const int64_t end = (task + 1) * each < a.rows ? (task + 1) * each : a.rows;
      for (int64_t row = task * each; row < end; ++row) one_row<STEP, V>(a, row);
    });
    return;
  }
  const int64_t pieces = (a.inner + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
  for_chunks(a.rows / a.inner * pieces, a.threads, [&](int64_t task) {
    const int64_t first = task % pieces * COLUMN_BLOCK, left = a.inner - first;
    some_columns<STEP, V>(a, task / pieces, first, left < COLUMN_BLOCK ? left : COLUMN_BLOCK);
  });
}

template <class V>
static void apply(const StableMaxArgs& a) {
  switch (a.step) {
    case STABLEMAX_FORWARD: return apply<STABLEMAX_FORWARD, V>(a);
    case STABLEMAX_LOG: return apply<STABLEMAX_LOG, V>(a);
    case STABLEMAX_BACKWARD: return apply<STABLEMAX_BACKWARD, V>(a);
    default: return apply<STABLEMAX_LOG_BACKWARD, V>(a);
  }
}

static void stablemax(const StableMaxArgs& a) {
  if (a.dtype == F64)
    apply<vf64>(a);
  else
    apply<vf32>(a);
}

}  // namespace FLCORE_ISA

extern const StableMaxFns FLCORE_TABLE(stablemax);
const StableMaxFns FLCORE_TABLE(stablemax) = {&FLCORE_ISA::stablemax, &FLCORE_ISA::collapse};

}  // namespace flcore
