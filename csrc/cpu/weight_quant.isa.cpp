// Low-bit weights: quantise and pack, unpack and dequantise, change the layout.
//
//   quantize    W [n, k] -> codes, scales, zeros: reads W once, 2 to 8 bytes a weight, and writes
//               bits / 8; a row is quantised group by group in cache, then 16 rows are packed
//   dequantize  the inverse: w = level S (+ zero), rounded to float32, then to the type of W
//   repack      rows <-> tile16, 16 rows at a time through a buffer of bytes; exact
//
// About 1.5 vector operations a weight, one of them a division; 31 times that with a search. The
// numbers are those of python/flcore/reference/weight_rules.py at every level and thread count: one
// operation, one rounding; errors in 16 lanes. Sources of the formats are named there.
#include "api.h"
#include "cpu/fma.h"
#include "cpu/isa.h"
#include "cpu/vec.h"
#include "cpu/weight_parts.h"
#include "cpu/weight_rules.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

// ---- quantize --------------------------------------------------------------------------------

template <int D>
void load_row(const void* x, int64_t begin, int64_t k, float* row) {
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) store(row + i, load_f32<D>(x, begin + i));
  for (; i < k; ++i) row[i] = load1<D>(x, begin + i);
  for (; i < row_values(k); ++i) row[i] = row[k - 1];  // does not change a range
}

// A row as float32, in whole multiples of 16: where it lies, or in `row`.
const float* load_row(const WeightQuantArgs& a, int64_t r, float* row) {
  if (a.k == 0) return row;
  switch (a.x_dtype) {
    case F64:
      load_row<F64>(a.x, r * a.k, a.k, row);
      break;
    case F32:
      if (a.k % ERROR_LANES == 0) return static_cast<const float*>(a.x) + r * a.k;
      load_row<F32>(a.x, r * a.k, a.k, row);
      break;
    case F16:
      load_row<F16>(a.x, r * a.k, a.k, row);
      break;
    default:
      load_row<BF16>(a.x, r * a.k, a.k, row);
  }
  return row;
}

// n values, whole multiples of 16; false: one is not finite
bool range_of(const WeightQuantArgs& a, const float* w, int64_t n, Range& range) {
  vi32 top{};
  range.least = range.most = 0;
  if (a.rule == WEIGHT_MIN_MAX) {
    vf32 least = load<vf32>(w), most = least;
    for (int64_t i = 0; i < n; i += LANES) {
      const vf32 x = load<vf32>(w + i);
      const vi32 absolute = (vi32)x & 0x7fffffff;
      top = top > absolute ? top : absolute;
      least = x < least ? x : least;
      most = x > most ? x : most;
    }
    range.least = from_ordered(~highest(~ordered((vi32)least)));
    range.most = from_ordered(highest(ordered((vi32)most)));
  } else {
    for (int64_t i = 0; i < n; i += LANES) {
      const vi32 absolute = load<vi32>(w + i) & 0x7fffffff;
      top = top > absolute ? top : absolute;
    }
  }
  const int32_t bits = highest(top);
  range.top = range.extreme = float_of(uint32_t(bits));
  if (a.rule == WEIGHT_Q4_0 && bits < 0x7f800000) {  // where it is first
    for (int64_t i = 0; i < n; i += LANES) {
      const vi32 x = load<vi32>(w + i);
      if (highest((vi32)((x & 0x7fffffff) == bits) & 1)) {
        int l = 0;
        while ((x[l] & 0x7fffffff) != bits) ++l;
        range.extreme = float_of(uint32_t(x[l]));
        break;
      }
    }
  }
  return bits < 0x7f800000;
}

float error_of(const WeightQuantArgs& a, const GroupScale& g, const float* w, int64_t n) {
  switch (code_path(a)) {
    case PATH_LINEAR:
      return group_error<PATH_LINEAR>(a, g, w, n);
    case PATH_SHIFTED:
      return group_error<PATH_SHIFTED>(a, g, w, n);
    case PATH_Q4_0:
      return group_error<PATH_Q4_0>(a, g, w, n);
    case PATH_Q8_0:
      return group_error<PATH_Q8_0>(a, g, w, n);
    case PATH_TABLE:
      return group_error<PATH_TABLE>(a, g, w, n);
    case PATH_E4M3:
      return group_error<PATH_E4M3>(a, g, w, n);
    default:
      return group_error<PATH_E5M2>(a, g, w, n);
  }
}

void codes_of_group(const WeightQuantArgs& a, const GroupScale& g, const float* w, int64_t n,
                    uint8_t* out) {
  switch (code_path(a)) {
    case PATH_LINEAR:
      return group_codes<PATH_LINEAR>(a, g, w, n, out);
    case PATH_SHIFTED:
      return group_codes<PATH_SHIFTED>(a, g, w, n, out);
    case PATH_Q4_0:
      return group_codes<PATH_Q4_0>(a, g, w, n, out);
    case PATH_Q8_0:
      return group_codes<PATH_Q8_0>(a, g, w, n, out);
    case PATH_TABLE:
      return group_codes<PATH_TABLE>(a, g, w, n, out);
    case PATH_E4M3:
      return group_codes<PATH_E4M3>(a, g, w, n, out);
    default:
      return group_codes<PATH_E5M2>(a, g, w, n, out);
  }
}

GroupScale best_scale(const WeightQuantArgs& a, const Range& range, const float* w, int64_t n) {
  GroupScale best = group_scale(a, range, a.factors[0]);
  if (a.factor_count == 1) return best;
  float least = error_of(a, best, w, n);
  for (int64_t i = 1; i < a.factor_count; ++i) {
    const GroupScale g = group_scale(a, range, a.factors[i]);
    const float error = error_of(a, g, w, n);
    if (error < least) {
      least = error;
      best = g;
    }
  }
  return best;
}

void put_scale(const WeightQuantArgs& a, int64_t row, int64_t group, const GroupScale& g) {
  const int64_t i = number_index(a, a.parts.layout, row, group);
  store1(a.scale_dtype, a.parts.scales, i, g.scale);
  if (!a.parts.zeros) return;
  if (a.kind == QW_INT)
    static_cast<uint8_t*>(a.parts.zeros)[i] = uint8_t(g.zero);
  else
    store1(a.scale_dtype, a.parts.zeros, i, g.zero);
}

FLCORE_INLINE bool finite(float x) { return (bits_of(x) & 0x7fffffffu) < 0x7f800000u; }

int flags_of(const GroupScale& g) {
  return finite(g.scale) && finite(g.zero) ? 0 : WEIGHT_SCALE_OVERFLOW;
}

int quantize_row(const WeightQuantArgs& a, const Workspace& w, int64_t row, uint8_t* codes) {
  const float* x = load_row(a, row, w.row);
  int flags = 0;
  for (int64_t g = 0, k = 0; k < a.k; ++g, k += a.group) {
    const int64_t n = a.k - k < a.group ? a.k - k : a.group;
    Range range;
    if (!range_of(a, x + k, n, range)) return WEIGHT_NONFINITE;
    const GroupScale scale = best_scale(a, range, x + k, n);
    flags |= flags_of(scale);
    put_scale(a, row, g, scale);
    codes_of_group(a, scale, x + k, n, codes + k);
  }
  return flags;
}

// One scale for all rows: its range, its best factor, then the codes.
int tensor_scale(const WeightQuantArgs& a, GroupScale& best) {
  Range* ranges =
      reinterpret_cast<Range*>(static_cast<char*>(a.scratch) + a.threads * thread_bytes(a));
  float* errors = reinterpret_cast<float*>(ranges + a.n);
  float* bad = errors + a.n;
  for_blocks(a, [&](const Workspace& w, int64_t block) {
    for (int64_t r = block * BLOCK_ROWS, end = r + rows_in(a, block); r < end; ++r) {
      bad[r] = range_of(a, load_row(a, r, w.row), a.k, ranges[r]) ? 0.0f : 1.0f;
    }
  });
  Range all = ranges[0];
  for (int64_t r = 0; r < a.n; ++r) {
    if (bad[r] > 0) return WEIGHT_NONFINITE;
    all.least = ranges[r].least < all.least ? ranges[r].least : all.least;
    all.most = ranges[r].most > all.most ? ranges[r].most : all.most;
    if (ranges[r].top > all.top) {
      all.top = ranges[r].top;
      all.extreme = ranges[r].extreme;
    }
  }
  double least = 0;
  for (int64_t i = 0; i < a.factor_count; ++i) {
    const GroupScale g = group_scale(a, all, a.factors[i]);
    double error = 0;
    if (a.factor_count > 1) {
      for_blocks(a, [&](const Workspace& w, int64_t block) {
        for (int64_t r = block * BLOCK_ROWS, end = r + rows_in(a, block); r < end; ++r) {
          errors[r] = error_of(a, g, load_row(a, r, w.row), a.k);
        }
      });
      for (int64_t r = 0; r < a.n; ++r) error += double(errors[r]);
    }
    if (i == 0 || error < least) {
      least = error;
      best = g;
    }
  }
  return flags_of(best);
}

int quantize(const WeightQuantArgs& a) {
  if (a.n == 0) return 0;
  GroupScale whole;
  int flags = 0;
  if (a.tensor && a.k > 0) flags = tensor_scale(a, whole);
  if (flags) return flags;
  for_blocks(a, [&](const Workspace& w, int64_t block) {
    int found = 0;
    for (int64_t r = 0; r < rows_in(a, block); ++r) {
      const int64_t row = block * BLOCK_ROWS + r;
      uint8_t* codes = w.codes + r * code_stride(a.k);
      if (!a.tensor) {
        found |= quantize_row(a, w, row, codes);
      } else if (a.k > 0) {
        put_scale(a, row, 0, whole);
        codes_of_group(a, whole, load_row(a, row, w.row), a.k, codes);
      }
    }
    if (found) {
      __atomic_fetch_or(&flags, found, __ATOMIC_RELAXED);
      return;
    }
    write_codes(a, a.parts, w, block);
    pad_numbers(a, a.parts, block);
  });
  return flags;
}

// ---- dequantize ------------------------------------------------------------------------------

struct GroupNumbers {
  float scale, zero;  // zero: what is taken from or added to a level
};

GroupNumbers numbers_of(const WeightQuantArgs& a, int64_t row, int64_t g) {
  const int64_t i = number_index(a, a.parts.layout, row, g);
  const float half = float(1 << (a.bits - 1));
  GroupNumbers v{load1(a.scale_dtype, a.parts.scales, i), half};
  if (a.kind == QW_INT && a.parts.zeros)
    v.zero = float(static_cast<const uint8_t*>(a.parts.zeros)[i]);
  if (a.kind == QW_FLOAT_ZERO) v.zero = load1(a.scale_dtype, a.parts.zeros, i);
  return v;
}

// LANES levels
template <int KIND>
FLCORE_INLINE vf32 levels_at(const uint8_t* codes, const float* table, float middle) {
  if constexpr (KIND == QW_TABLE) return look_up(table, codes);
  const vi32 q = load_u8(codes);
  if constexpr (KIND == QW_E4M3 || KIND == QW_E5M2) return fp8_values(q, fp8_of(KIND));
  return to_float(q) - middle;
}

// n weights of a group
template <int KIND, int D>
FLCORE_INLINE void expand(const uint8_t* codes, const GroupNumbers& g, float half,
                          const float* table, int64_t n, void* to, int64_t at) {
  const float middle = KIND == QW_INT ? g.zero : half;
  float last[LANES];
  int64_t i = 0;
  if constexpr (D == F64) {
    for (; i < n; i += LANES) {
      store(last, levels_at<KIND>(codes + i, table, middle));
      for (int64_t l = 0; l < LANES && i + l < n; ++l) {
        const double product = double(last[l]) * double(g.scale);
        store1<F64>(to, at + i + l, KIND == QW_FLOAT_ZERO ? product + double(g.zero) : product);
      }
    }
  } else {
    const vf32 scale = vf32{} + g.scale, zero = vf32{} + g.zero;
    const auto weights = [&]() FLCORE_LAMBDA {
      const vf32 v = levels_at<KIND>(codes + i, table, middle);
      return KIND == QW_FLOAT_ZERO ? vfma(v, scale, zero) : v * scale;
    };
    for (; i + LANES <= n; i += LANES) store_lanes<D>(to, at + i, weights());
    if (i == n) return;
    store(last, weights());
    for (int64_t l = 0; i + l < n; ++l) store1<D>(to, at + i + l, last[l]);
  }
}

template <int KIND, int D>
void expand_row(const WeightQuantArgs& a, int64_t row, const uint8_t* codes) {
  const float half = float(1 << (a.bits - 1));
  for (int64_t g = 0, k = 0; k < a.k; ++g, k += a.group) {
    const int64_t n = a.k - k < a.group ? a.k - k : a.group;
    expand<KIND, D>(codes + k, numbers_of(a, row, g), half, a.table, n, a.x, row * a.k + k);
  }
}

typedef void (*ExpandRow)(const WeightQuantArgs&, int64_t, const uint8_t*);

template <int KIND>
ExpandRow expand_kind(int dtype) {
  return dtype == F64   ? expand_row<KIND, F64>
         : dtype == F32 ? expand_row<KIND, F32>
         : dtype == F16 ? expand_row<KIND, F16>
                        : expand_row<KIND, BF16>;
}

ExpandRow expand_of(const WeightQuantArgs& a) {
  switch (a.kind) {
    case QW_INT:
      return expand_kind<QW_INT>(a.x_dtype);
    case QW_FLOAT_ZERO:
      return expand_kind<QW_FLOAT_ZERO>(a.x_dtype);
    case QW_TABLE:
      return expand_kind<QW_TABLE>(a.x_dtype);
    case QW_E4M3:
      return expand_kind<QW_E4M3>(a.x_dtype);
    default:
      return expand_kind<QW_E5M2>(a.x_dtype);
  }
}

void dequantize(const WeightQuantArgs& a) {
  const ExpandRow expand = expand_of(a);
  for_blocks(a, [&](const Workspace& w, int64_t block) {
    read_codes(a, w, block);
    for (int64_t r = 0; r < rows_in(a, block); ++r)
      expand(a, block * BLOCK_ROWS + r, w.codes + r * code_stride(a.k));
  });
}

// ---- repack ----------------------------------------------------------------------------------

void move_numbers(const WeightQuantArgs& a, const void* from, void* to, int64_t block, int bytes) {
  if (!from || !to) return;
  for (int64_t g = 0; g < groups_of(a); ++g) {
    for (int64_t r = 0; r < rows_in(a, block); ++r) {
      const int64_t row = block * BLOCK_ROWS + r, i = number_index(a, a.parts.layout, row, g),
                    j = number_index(a, a.to.layout, row, g);
      const char* source = static_cast<const char*>(from) + i * bytes;
      char* target = static_cast<char*>(to) + j * bytes;
      if (bytes == 4)
        store(target, load<uint32_t>(source));
      else if (bytes == 2)
        store(target, load<uint16_t>(source));
      else
        *target = *source;
    }
  }
}

void repack(const WeightQuantArgs& a) {
  const int scale_bytes = int(dtype_bytes(a.scale_dtype));
  for_blocks(a, [&](const Workspace& w, int64_t block) {
    read_codes(a, w, block);
    write_codes(a, a.to, w, block);
    move_numbers(a, a.parts.scales, a.to.scales, block, scale_bytes);
    move_numbers(a, a.parts.zeros, a.to.zeros, block, a.kind == QW_INT ? 1 : scale_bytes);
    pad_numbers(a, a.to, block);
  });
}

}  // namespace
}  // namespace FLCORE_ISA

extern const WeightQuantFns FLCORE_TABLE(weight_quant);
const WeightQuantFns FLCORE_TABLE(weight_quant) = {&FLCORE_ISA::quantize, &FLCORE_ISA::dequantize,
                                                   &FLCORE_ISA::repack, &FLCORE_ISA::scratch_bytes};

}  // namespace flcore
