// Weighted sums of n client rows, each a list of layers:
//   combine:  acc[j] = start[j] + w_0 x_0[j] + w_1 x_1[j] + ...   in client order, multiply then add
//             Reads every value once and writes one row: n*s + s bytes a coordinate (s = bytes of
//             the dtype); streaming into a state: s*n + 8 (float32 state).
//   rows:     m such sums over the same rows. A tile of all rows stays in cache while the m outputs
//             are formed: n*s + m*s bytes a coordinate.
//   step:     a server optimiser (cpu/step.h) along the sum, which never goes to memory: n*s + 24
//             bytes for adam on float32 (w, m and v read and written), 16 with momentum, 8 with sgd.
// A tile of accumulators stays in cache while the rows pass by eight at a time (cpu/sums.h). Packets
// in the place of rows are decoded on the way (cpu/packet_sums.h).
//
// Exactness: no fused multiply-add, fixed order, element by element: the same bits at every level,
// tile size and thread count. Rows of int8 carry their scale in the weight, rounded once.
//
// Non-finite values stick under addition, hence the finished sums tell, for 1/n of the work,
// whether any input was non-finite (or the sum overflowed); the caller then looks for the row.
#include "api.h"
#include "cpu/isa.h"
#include "cpu/packet_sums.h"
#include "cpu/step.h"
#include "cpu/sums.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// Accumulators of one tile, in bytes. Long tiles let the prefetcher run along each row (128 KiB read
// 5 % faster than 16 KiB from memory, L2 notwithstanding); short ones feed more threads.
constexpr int64_t TILE_MIN = 16 << 10, TILE_MAX = 128 << 10;
constexpr int64_t STEP_TILE = 8192;  // coordinates: sums, model and state of a tile fit in L2
constexpr int64_t ROWS_BYTES = 512 << 10;  // of all rows of a tile that m sums read again

static int out_dtype(const CombineArgs& a, int64_t layer) {
  return a.out_dtype ? a.out_dtype[layer] : a.dtype[layer];
}
static bool wide(const CombineArgs& a, int64_t layer) {
  return a.accumulate == ACC_F64 || out_dtype(a, layer) == F64;
}

// Coordinates of one tile. The size does not change a bit of the result.
static int64_t tile_of(const CombineArgs& a, int64_t layer, int64_t bytes) {
  if (a.accumulate == ACC_REPRODUCIBLE) return TILE_BINS;
  return bytes / (wide(a, layer) ? 8 : 4);
}

// CALL with D the dtype of a layer's rows
#define FLCORE_BY_DTYPE(found, dtype, CALL)                          \
  switch (dtype) {                                                   \
    case F64: { constexpr int D = F64; found = CALL; } break;        \
    case F32: { constexpr int D = F32; found = CALL; } break;        \
    case F16: { constexpr int D = F16; found = CALL; } break;        \
    case I8: { constexpr int D = I8; found = CALL; } break;          \
    default: { constexpr int D = BF16; found = CALL; } break;        \
  }

static void report(int* flags, int found) {
  if (found) __atomic_fetch_or(flags, found, __ATOMIC_RELAXED);
}

// ---- combine -----------------------------------------------------------------------------------

template <int D, class Acc>
static int tile_plain(const CombineArgs& a, const Rows& rows, int64_t layer, int64_t offset,
                      int64_t m, void* out) {
  alignas(64) Acc local[TILE_MAX / sizeof(Acc)];
  Acc* state = a.state ? static_cast<Acc*>(a.state[layer]) + offset : nullptr;
  Acc* acc = local;
  if (!out)
    acc = state;  // streaming: in place
  else if (state)
    __builtin_memcpy(local, state, size_t(m) * sizeof(Acc));
  add_rows<D>(rows, offset, acc, m, state == nullptr);
  const int flags = a.check ? finite_flag(acc, m) : 0;
  if (out) write_out(out_dtype(a, layer), acc, m, a.divisor, out, offset);
  return flags;
}

template <int D>
static int tile_bins(const CombineArgs& a, const Rows& rows, int64_t layer, int64_t offset,
                     int64_t m, void* out) {
  alignas(64) double acc[3 * TILE_BINS];
  const int64_t numel = a.numel[layer];
  double* state = a.state ? static_cast<double*>(a.state[layer]) + offset : nullptr;
  for (int b = 0; b < 3; ++b)
    if (state)
      __builtin_memcpy(acc + b * TILE_BINS, state + b * numel, size_t(m) * 8);
    else
      __builtin_memset(acc + b * TILE_BINS, 0, size_t(m) * 8);
  const bool range = add_rows_bins<D>(rows, offset, acc, m);
  if (!out) {
    for (int b = 0; b < 3; ++b)
      __builtin_memcpy(state + b * numel, acc + b * TILE_BINS, size_t(m) * 8);
    return range ? COMBINE_OUT_OF_RANGE | finite_flag(acc, m) : 0;
  }
  join_bins(acc, m);
  write_out(out_dtype(a, layer), acc, m, a.divisor, out, offset);
  return finite_flag(acc, m) | (range ? COMBINE_OUT_OF_RANGE : 0);
}

// One sum over one tile; out: the layer's output, or null for streaming.
template <int D>
static int tile(const CombineArgs& a, const Rows& rows, int64_t layer, int64_t offset, int64_t m,
                void* out) {
  if (a.accumulate == ACC_REPRODUCIBLE) return tile_bins<D>(a, rows, layer, offset, m, out);
  if constexpr (D != F64)
    if (!wide(a, layer)) return tile_plain<D, float>(a, rows, layer, offset, m, out);
  return tile_plain<D, double>(a, rows, layer, offset, m, out);
}

// Bytes of sums that a thread needs for packets.
static int64_t packet_scratch(const CombineArgs& a) {
  return sum_bytes(plan_sums(a, [&](int64_t l) { return wide(a, l); }));
}

// The same for packets.
static int combine_packets(const CombineArgs& a) {
  const auto is_wide = [&](int64_t l) { return wide(a, l); };
  return sum_packets(a, is_wide, [&](int64_t l, int64_t offset, int64_t m, auto* sums) {
    const int flags = a.check || a.accumulate == ACC_REPRODUCIBLE ? finite_flag(sums, m) : 0;
    write_out(out_dtype(a, l), sums, m, a.divisor, a.out[l], offset);
    return flags;
  });
}

static int combine(const CombineArgs& a) {
  if (a.packets) return combine_packets(a);
  int64_t all = 0, bytes = TILE_MIN;
  for (int64_t l = 0; l < a.layers; ++l) all += 4 * a.numel[l];
  while (bytes < TILE_MAX && all / (2 * bytes) >= 8 * a.threads) bytes *= 2;  // 8 tiles a thread
  const auto size = [&](int64_t l) { return tile_of(a, l, bytes); };
  int flags = 0;
  for_tiles(a.layers, a.numel, a.first_tile, a.threads, size,
            [&](int64_t l, int64_t offset, int64_t m) {
              const Rows rows = rows_of(a, l);
              void* out = a.out ? a.out[l] : nullptr;
              int found = 0;
              FLCORE_BY_DTYPE(found, a.dtype[l], tile<D>(a, rows, l, offset, m, out))
              report(&flags, found);
            });
  return flags;
}

// ---- rows: many sums of the same rows ----------------------------------------------------------

static int combine_rows(const CombineRowsArgs& a) {
  const CombineArgs& s = a.sums;
  const auto size = [&](int64_t l) {
    if (s.accumulate == ACC_REPRODUCIBLE) return TILE_BINS;
    const int64_t fit = ROWS_BYTES / (dtype_bytes(s.dtype[l]) * (s.n > 0 ? s.n : 1)) / 64 * 64;
    const int64_t most = tile_of(s, l, TILE_MIN);
    return fit < 256 ? int64_t(256) : fit < most ? fit : most;
  };
  int flags = 0;
  for_tiles(s.layers, s.numel, s.first_tile, s.threads, size,
            [&](int64_t l, int64_t offset, int64_t m) {
              int found = 0;
              for (int64_t k = 0; k < a.m; ++k) {
                const int64_t start = a.starts[k];
                const Rows rows{s.rows + l, s.layers, a.index + start, a.coefficients + start, 1,
                                a.starts[k + 1] - start};
                void* out = a.out[k * s.layers + l];
                int one = 0;
                FLCORE_BY_DTYPE(one, s.dtype[l], tile<D>(s, rows, l, offset, m, out))
                found |= one;
              }
              report(&flags, found);
            });
  return flags;
}

// ---- step: the sum and a server optimiser ------------------------------------------------------

// D of one tile as `combine` would round it to T: sums in Acc, the division, one rounding.
template <int D, class Acc, class T>
static int aggregate(const CombineArgs& a, int64_t layer, int64_t offset, int64_t m,
                     const Acc* base, T* d) {
  alignas(64) Acc wide_sums[sizeof(Acc) == sizeof(T) ? 1 : STEP_TILE];
  Acc* acc = wide_sums;
  if constexpr (sizeof(Acc) == sizeof(T)) acc = d;
  if (base)
    add_rows<D, Acc, true>(rows_of(a, layer), offset, acc, m, true, base);
  else
    add_rows<D>(rows_of(a, layer), offset, acc, m, true);
  const int flags = a.check ? finite_flag(acc, m) : 0;
  if (sizeof(Acc) != sizeof(T) || a.divisor != 1.0)
    write_out<sizeof(T) == 4 ? F32 : F64>(acc, m, a.divisor, d, 0);
  return flags;
}

template <int D, class T>
static int aggregate_bins(const CombineArgs& a, int64_t layer, int64_t offset, int64_t m,
                          const double* base, T* d) {
  alignas(64) double acc[3 * TILE_BINS] = {};
  const bool range = add_rows_bins<D>(rows_of(a, layer), offset, acc, m, base);
  join_bins(acc, m);
  write_out<sizeof(T) == 4 ? F32 : F64>(acc, m, a.divisor, d, 0);
  return finite_flag(acc, m) | (range ? COMBINE_OUT_OF_RANGE : 0);
}

// The model's tile as Acc, or null when the rows are updates.
template <class Acc>
static const Acc* model_tile(const StepArgs& a, int64_t layer, int64_t offset, int64_t m,
                             Acc* base) {
  if (!a.models) return nullptr;
  const void* model = a.model[layer];
#define FLCORE_WIDEN(W)                            \
  for (int64_t i = 0; i < m; ++i)                  \
  base[i] = sizeof(Acc) == 4 ? Acc(load1<W>(model, offset + i)) : Acc(load1_f64<W>(model, offset + i))
  switch (a.model_dtype[layer]) {
    case F64: FLCORE_WIDEN(F64); break;
    case F32: FLCORE_WIDEN(F32); break;
    case F16: FLCORE_WIDEN(F16); break;
    default: FLCORE_WIDEN(BF16); break;
  }
#undef FLCORE_WIDEN
  return base;
}

template <int D, class T>
static int tile_step(const StepArgs& a, int64_t layer, int64_t offset, int64_t m) {
  alignas(64) T d[STEP_TILE];
  const CombineArgs& s = a.sum;
  int flags = 0;
  if (D == F64 || sizeof(T) == 8 || s.accumulate != ACC_F32) {
    alignas(64) double base[STEP_TILE];
    const double* from = model_tile(a, layer, offset, m, base);
    flags = s.accumulate == ACC_REPRODUCIBLE ? aggregate_bins<D>(s, layer, offset, m, from, d)
                                             : aggregate<D>(s, layer, offset, m, from, d);
  } else if constexpr (D != F64 && sizeof(T) == 4) {
    alignas(64) float base[STEP_TILE];
    flags = aggregate<D>(s, layer, offset, m, model_tile(a, layer, offset, m, base), d);
  }
  if (a.noise_std != 0) add_noise(a, layer, offset, d, m);
  return flags | (step_tile(a, layer, offset, d, m) & (s.check ? ~0 : ~STEP_NONFINITE));
}

// The sums of packets over a part of a layer, and the step along them.
template <class T, class Acc>
static int packet_step(const StepArgs& a, int64_t layer, int64_t offset, int64_t m, Acc* sums) {
  alignas(64) T rounded[BLOCK_MAX];
  const CombineArgs& s = a.sum;
  T* const d = rounded;
  const int flags = s.check || s.accumulate == ACC_REPRODUCIBLE ? finite_flag(sums, m) : 0;
  if (a.new_sum)
    __builtin_memcpy(static_cast<Acc*>(a.new_sum[layer]) + offset, sums, size_t(m) * sizeof(Acc));
  write_out<sizeof(T) == 4 ? F32 : F64>(sums, m, s.divisor, d, 0);
  if (a.noise_std != 0) add_noise(a, layer, offset, d, m);
  return flags | (step_tile(a, layer, offset, d, m) & (s.check ? ~0 : ~STEP_NONFINITE));
}

static int packets_step(const StepArgs& a) {
  const CombineArgs& s = a.sum;
  const auto is_wide = [&](int64_t l) { return wide(s, l); };
  return sum_packets(s, is_wide, [&](int64_t l, int64_t offset, int64_t m, auto* sums) {
    return s.out_dtype[l] == F64 ? packet_step<double>(a, l, offset, m, sums)
                                 : packet_step<float>(a, l, offset, m, sums);
  });
}

static int combine_step(const StepArgs& a) {
  const CombineArgs& s = a.sum;
  if (s.packets) return packets_step(a);
  const auto size = [&](int64_t) {
    return s.accumulate == ACC_REPRODUCIBLE ? TILE_BINS : STEP_TILE;
  };
  int flags = 0;
  for_tiles(s.layers, s.numel, s.first_tile, s.threads, size,
            [&](int64_t l, int64_t offset, int64_t m) {
              int found = 0;
              if (s.out_dtype[l] == F64)
                FLCORE_BY_DTYPE(found, s.dtype[l], (tile_step<D, double>(a, l, offset, m)))
              else
                FLCORE_BY_DTYPE(found, s.dtype[l], (tile_step<D, float>(a, l, offset, m)))
              report(&flags, found);
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
    case I8: return false;
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
const CombineFns FLCORE_TABLE(combine) = {&FLCORE_ISA::combine, &FLCORE_ISA::nonfinite,
                                          &FLCORE_ISA::combine_rows, &FLCORE_ISA::combine_step,
                                          &FLCORE_ISA::packet_scratch};

}  // namespace flcore
