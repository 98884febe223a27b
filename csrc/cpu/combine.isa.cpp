// Weighted sum of n client rows, each a list of layers:
//   acc[j] = start[j] + w_0 x_0[j] + w_1 x_1[j] + ...      in client order, multiply then add
// Reads every value once and writes one row: n*s + s bytes a coordinate (s = bytes of the dtype);
// streaming into a state: s*n + 8 (float32 state). A tile of accumulators stays in cache while the
// rows pass by eight at a time, so the sums never travel to memory in between.
//
// Exactness: no fused multiply-add, fixed order, element by element: the same bits at every level,
// tile size and thread count. float32 products of float16/bfloat16 inputs are formed in float32.
// Reproducible sums: float64 products are cut on an absolute grid of three bins (BIN_UNIT); sums
// of multiples of one unit are exact, so that neither order nor grouping changes a bit
// (pre-rounding as in Demmel & Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013).
//
// Non-finite values stick under addition, hence the finished sums tell, for 1/n of the work,
// whether any input was non-finite (or the sum overflowed); the caller then looks for the row.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/layers.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// Accumulators of one tile, in bytes. Long tiles let the prefetcher run along each row (128 KiB read
// 5 % faster than 16 KiB from memory, L2 notwithstanding); short ones feed more threads.
constexpr int64_t TILE_MIN = 16 << 10, TILE_MAX = 128 << 10;
constexpr int64_t TILE_BINS = 1024;  // coordinates; three float64 bins each

static bool wide(int dtype, int accumulate) { return accumulate == ACC_F64 || dtype == F64; }

// Coordinates of one tile. The size does not change a bit of the result.
static int64_t tile_of(int dtype, int accumulate, int64_t bytes) {
  if (accumulate == ACC_REPRODUCIBLE) return TILE_BINS;
  return bytes / (wide(dtype, accumulate) ? 8 : 4);
}

// ---- float32 accumulators ----------------------------------------------------------------------

// R rows at once; `fresh` starts from the first product (so that 1 * x is x, the sign of 0 included)
template <int D, int R>
static void add_rows_f32(const void* const* x, const double* w, int64_t stride, int64_t offset,
                         float* acc, int64_t m, bool fresh) {
  const void* p[R];
  float wr[R];
  for (int r = 0; r < R; ++r) {
    p[r] = x[r * stride];
    wr[r] = float(w[r]);
  }
  int64_t i = 0;
  for (; i + 2 * LANES <= m; i += 2 * LANES) {
    const vf32 first = wr[0] * load_f32<D>(p[0], offset + i);
    const vf32 second = wr[0] * load_f32<D>(p[0], offset + i + LANES);
    vf32 a = fresh ? first : load<vf32>(acc + i) + first;
    vf32 b = fresh ? second : load<vf32>(acc + i + LANES) + second;
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) {
      a = a + wr[r] * load_f32<D>(p[r], offset + i);
      b = b + wr[r] * load_f32<D>(p[r], offset + i + LANES);
    }
    store(acc + i, a);
    store(acc + i + LANES, b);
  }
  for (; i < m; ++i) {
    const float first = wr[0] * load1<D>(p[0], offset + i);
    float a = fresh ? first : acc[i] + first;
    for (int r = 1; r < R; ++r) a = a + wr[r] * load1<D>(p[r], offset + i);
    acc[i] = a;
  }
}

// ---- float64 accumulators ----------------------------------------------------------------------

template <int D, int R>
static void add_rows_f64(const void* const* x, const double* w, int64_t stride, int64_t offset,
                         double* acc, int64_t m, bool fresh) {
  const void* p[R];
  for (int r = 0; r < R; ++r) p[r] = x[r * stride];
  int64_t i = 0;
  for (; i + LANES64 <= m; i += LANES64) {
    const vf64 first = w[0] * load_f64<D>(p[0], offset + i);
    vf64 a = fresh ? first : load<vf64>(acc + i) + first;
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) a = a + w[r] * load_f64<D>(p[r], offset + i);
    store(acc + i, a);
  }
  for (; i < m; ++i) {
    const double first = w[0] * load1_f64<D>(p[0], offset + i);
    double a = fresh ? first : acc[i] + first;
    for (int r = 1; r < R; ++r) a = a + w[r] * load1_f64<D>(p[r], offset + i);
    acc[i] = a;
  }
}

// All rows of one tile, eight at a time and the rest one, two or four at a time.
template <int D, class Acc>
static void add_rows(const CombineArgs& a, int64_t layer, int64_t offset, Acc* acc, int64_t m,
                     bool fresh) {
  const void* const* x = a.rows + layer;
  const double* w = a.weights;
#define FLCORE_ROWS(R)                                                                       \
  for (; a.n - i >= R; i += R, fresh = false) {                                              \
    if constexpr (sizeof(Acc) == 4)                                                          \
      add_rows_f32<D, R>(x + i * a.layers, w + i, a.layers, offset, acc, m, fresh);          \
    else                                                                                     \
      add_rows_f64<D, R>(x + i * a.layers, w + i, a.layers, offset, acc, m, fresh);          \
  }
  int64_t i = 0;
  FLCORE_ROWS(8)
  FLCORE_ROWS(4)
  FLCORE_ROWS(2)
  FLCORE_ROWS(1)
#undef FLCORE_ROWS
}

// ---- reproducible: three float64 bins ----------------------------------------------------------

// p = q0 + q1 + q2 + rest: multiples of the three units, |rest| <= unit 2 / 2 is dropped
template <int D>
static bool add_row_bins(const void* x, double w, int64_t offset, double* acc, int64_t m) {
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
    const vf64 p = w * load_f64<D>(x, offset + i);
    bad |= ~((p < BIN_LIMIT) & (p > -BIN_LIMIT));  // true for NaN too
    FLCORE_DEPOSIT(vf64, p, FLCORE_VLOAD, FLCORE_VSTORE);
  }
#define FLCORE_SLOAD(b) b[i]
#define FLCORE_SSTORE(b, v) b[i] = v
  bool any = false;
  for (; i < m; ++i) {
    const double p = w * load1_f64<D>(x, offset + i);
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

// ---- from accumulators to the layer's dtype ----------------------------------------------------

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

static int finite_flag(const float* acc, int64_t m) { return finite_flag<float, vf32>(acc, m); }
static int finite_flag(const double* acc, int64_t m) { return finite_flag<double, vf64>(acc, m); }

template <int D, class Acc>
static void write_out(const Acc* acc, int64_t m, double divisor, void* out, int64_t offset) {
  if (divisor == 1.0)
    for (int64_t i = 0; i < m; ++i) store1<D>(out, offset + i, acc[i]);
  else if (sizeof(Acc) == 4)  // one rounding to float32, so that casting twice changes nothing
    for (int64_t i = 0; i < m; ++i)
      store1<D>(out, offset + i, float(double(acc[i]) / divisor));
  else
    for (int64_t i = 0; i < m; ++i) store1<D>(out, offset + i, double(acc[i]) / divisor);
}

// ---- one tile ----------------------------------------------------------------------------------

template <int D, class Acc>
static int tile_plain(const CombineArgs& a, int64_t layer, int64_t offset, int64_t m) {
  alignas(64) Acc local[TILE_MAX / sizeof(Acc)];
  Acc* state = a.state ? static_cast<Acc*>(a.state[layer]) + offset : nullptr;
  Acc* acc = local;
  if (!a.out)
    acc = state;  // streaming: in place
  else if (state)
    __builtin_memcpy(local, state, size_t(m) * sizeof(Acc));
  else if (a.n == 0)
    __builtin_memset(local, 0, size_t(m) * sizeof(Acc));
  add_rows<D>(a, layer, offset, acc, m, state == nullptr);
  const int flags = a.check ? finite_flag(acc, m) : 0;
  if (a.out) write_out<D>(acc, m, a.divisor, a.out[layer], offset);
  return flags;
}

template <int D>
static int tile_bins(const CombineArgs& a, int64_t layer, int64_t offset, int64_t m) {
  alignas(64) double acc[3 * TILE_BINS];
  const int64_t numel = a.numel[layer];
  double* state = a.state ? static_cast<double*>(a.state[layer]) + offset : nullptr;
  for (int b = 0; b < 3; ++b)
    if (state)
      __builtin_memcpy(acc + b * TILE_BINS, state + b * numel, size_t(m) * 8);
    else
      __builtin_memset(acc + b * TILE_BINS, 0, size_t(m) * 8);
  bool range = false;
  for (int64_t i = 0; i < a.n; ++i)
    range |= add_row_bins<D>(a.rows[i * a.layers + layer], a.weights[i], offset, acc, m);
  if (!a.out) {
    for (int b = 0; b < 3; ++b)
      __builtin_memcpy(state + b * numel, acc + b * TILE_BINS, size_t(m) * 8);
    return range ? COMBINE_OUT_OF_RANGE | finite_flag(acc, m) : 0;
  }
  for (int64_t i = 0; i < m; ++i)
    acc[i] = (acc[i] + acc[TILE_BINS + i]) + acc[2 * TILE_BINS + i];
  write_out<D>(acc, m, a.divisor, a.out[layer], offset);
  return finite_flag(acc, m) | (range ? COMBINE_OUT_OF_RANGE : 0);
}

template <int D>
static int tile(const CombineArgs& a, int64_t layer, int64_t offset, int64_t m) {
  if (a.accumulate == ACC_REPRODUCIBLE) return tile_bins<D>(a, layer, offset, m);
  if (wide(D, a.accumulate)) return tile_plain<D, double>(a, layer, offset, m);
  return tile_plain<D, float>(a, layer, offset, m);
}

// Calls body(layer, offset, length) for each tile of each layer; size(l) coordinates make a tile of
// layer l, and `first` receives the number of each layer's first tile.
template <class TileOf, class Body>
static void for_tiles(int64_t layers, const int64_t* numel, int64_t* first, int threads,
                      const TileOf& size, const Body& body) {
  first[0] = 0;
  for (int64_t l = 0; l < layers; ++l)
    first[l + 1] = first[l] + (numel[l] + size(l) - 1) / size(l);
  for_chunks(first[layers], threads, [&](int64_t tile) {
    const int64_t l = find_layer(first, layers, tile);
    const int64_t offset = (tile - first[l]) * size(l), rest = numel[l] - offset;
    body(l, offset, rest < size(l) ? rest : size(l));
  });
}

static int combine(const CombineArgs& a) {
  int64_t all = 0, bytes = TILE_MIN;
  for (int64_t l = 0; l < a.layers; ++l) all += 4 * a.numel[l];
  while (bytes < TILE_MAX && all / (2 * bytes) >= 8 * a.threads) bytes *= 2;  // 8 tiles a thread
  const auto size = [&](int64_t l) { return tile_of(a.dtype[l], a.accumulate, bytes); };
  int flags = 0;
  for_tiles(a.layers, a.numel, a.first_tile, a.threads, size,
            [&](int64_t l, int64_t offset, int64_t m) {
              int found = 0;
              switch (a.dtype[l]) {
                case F64: found = tile<F64>(a, l, offset, m); break;
                case F32: found = tile<F32>(a, l, offset, m); break;
                case F16: found = tile<F16>(a, l, offset, m); break;
                default: found = tile<BF16>(a, l, offset, m); break;
              }
              if (found) __atomic_fetch_or(&flags, found, __ATOMIC_RELAXED);
            });
  return flags;
}

// ---- which rows hold NaN or infinity -----------------------------------------------------------

// All exponent bits set, tested on the stored bits so that nothing is rounded on the way.
template <class Bits, class Vec>
static bool exponent_full(const void* x, int64_t offset, int64_t m, Bits mask) {
  constexpr int64_t WIDTH = int64_t(sizeof(Vec) / sizeof(Bits));
  const char* p = static_cast<const char*>(x) + int64_t(sizeof(Bits)) * offset;
  Vec found = {};
  int64_t i = 0;
  for (; i + WIDTH <= m; i += WIDTH)
    found |= (Vec)((load<Vec>(p + i * int64_t(sizeof(Bits))) & mask) == mask);
  bool any = false;
  for (; i < m; ++i) any |= (load<Bits>(p + i * int64_t(sizeof(Bits))) & mask) == mask;
  for (int k = 0; k < WIDTH; ++k) any |= found[k] != 0;
  return any;
}

static bool row_nonfinite(int dtype, const void* x, int64_t offset, int64_t m) {
  switch (dtype) {
    case F64: return exponent_full<uint64_t, vu64>(x, offset, m, uint64_t(0x7ff) << 52);
    case F32: return exponent_full<uint32_t, vu32>(x, offset, m, 0x7f800000u);
    case F16: return exponent_full<uint16_t, vu16>(x, offset, m, uint16_t(0x7c00));
    default: return exponent_full<uint16_t, vu16>(x, offset, m, uint16_t(0x7f80));
  }
}

constexpr int64_t FINITE_TILE = 1 << 14;

static void nonfinite(const FiniteArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) a.flags[i] = 0;
  const auto size = [](int64_t) { return FINITE_TILE; };
  for_tiles(a.layers, a.numel, a.first_tile, a.threads, size,
            [&](int64_t l, int64_t offset, int64_t m) {
              for (int64_t i = 0; i < a.n; ++i)
                if (row_nonfinite(a.dtype[l], a.rows[i * a.layers + l], offset, m))
                  __atomic_store_n(&a.flags[i], 1, __ATOMIC_RELAXED);
            });
}

}  // namespace FLCORE_ISA

extern const CombineFns FLCORE_TABLE(combine);
const CombineFns FLCORE_TABLE(combine) = {&FLCORE_ISA::combine, &FLCORE_ISA::nonfinite};

}  // namespace flcore
