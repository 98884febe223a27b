// Mean and sum of squared deviations of each layer of n client rows, and the affine map of a layer:
//   mean_l = sum_j x_j / n_l,   m2_l = sum_j (x_j - mean_l)^2,   out_j = scale_l x_j + shift_l
// Moments read every value once (s bytes); with MOMENTS_ADD the same read folds the row into a
// float32 accumulator (s + 8 bytes). The map reads and writes (2 s bytes).
//
// A tile is shifted by its first value p, an element of it, so that n (mean - p)^2 <= n m2: what
// sum (x - p)^2 - (sum (x - p))^2 / n cancels is at most n times what it keeps, and the relative
// error of m2 stays below about 2 MOMENT_TILE 2^-53 = 1e-12 at any distance of the mean from zero.
// Tiles are joined two by two (Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm
// for computing sample variances", COMPSTAT 1982), their means as distances from the first value of
// the layer: rounded as they are, means near 1e9 would cost half of the digits.
//
// Exactness: float64 sums in 16 lanes, a fixed tree of tiles, no fma: the same bits at every level
// and thread count. acc += w x has the bits of combine. The map is computed in float64 and rounded
// once. An infinity gives the mean that float64 gives and m2 = NaN.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/layers.h"
#include "cpu/vec.h"
#include "cpu/wide.h"

namespace flcore {
namespace FLCORE_ISA {

// Where the values of a layer come from. What is added up is fixed when compiling: one of
enum Source { ROW, BLEND, SCALED_ACC };  // x | acc_weight acc + row_weight x | acc_weight acc

struct Layer {
  const void *row, *acc;
  double acc_weight, row_weight;
};

template <int D>
struct Accumulator {  // its storage type
  static constexpr int dtype = D == F64 ? F64 : F32;
};

// LANES64 values of the source
template <int D, int S>
FLCORE_INLINE vf64 values(const Layer& l, int64_t i) {
  if constexpr (S == ROW) return load_wide<D>(l.row, i);
  const vf64 z = l.acc_weight * load_wide<Accumulator<D>::dtype>(l.acc, i);
  if constexpr (S == SCALED_ACC) return z;
  return z + l.row_weight * load_wide<D>(l.row, i);
}

template <int D, int S>
FLCORE_INLINE double value(const Layer& l, int64_t i) {
  if constexpr (S == ROW) return load1_f64<D>(l.row, i);
  const double z = l.acc_weight * load1_f64<Accumulator<D>::dtype>(l.acc, i);
  if constexpr (S == SCALED_ACC) return z;
  return z + l.row_weight * load1_f64<D>(l.row, i);
}

// ---- one tile ----------------------------------------------------------------------------------

static bool finite(double x) { return x - x == 0; }

// Sums of x - p and its square over the full rows of 16 lanes. Where 16 lanes of both sums do not
// fit into the registers, half of the lanes take their turn after the other half.
template <int D, int S>
static void sum_lanes(const Layer& l, int64_t offset, int64_t rows, double p, double* sum,
                      double* square) {
  constexpr int VECTORS = MOMENT_LANES / LANES64 < 4 ? MOMENT_LANES / LANES64 : 4;
  for (int first = 0; first < MOMENT_LANES; first += VECTORS * LANES64) {
    vf64 s1[VECTORS] = {}, s2[VECTORS] = {};
    const int64_t end = offset + rows * MOMENT_LANES;
    for (int64_t i = offset + first; i < end; i += MOMENT_LANES)
#pragma GCC unroll 4
      for (int k = 0; k < VECTORS; ++k) {
        const vf64 d = values<D, S>(l, i + k * LANES64) - p;
        s1[k] += d;
        s2[k] += d * d;
      }
    for (int k = 0; k < VECTORS; ++k) {
      store(sum + first + k * LANES64, s1[k]);
      store(square + first + k * LANES64, s2[k]);
    }
  }
}

template <int D, int S>
static void tile_moments(const Layer& l, int64_t offset, int64_t m, double* result) {
  double p = value<D, S>(l, offset);
  if (!finite(p)) p = 0;  // infinity - infinity would hide the sign that the mean keeps
  double sum[MOMENT_LANES], square[MOMENT_LANES];
  const int64_t rows = m / MOMENT_LANES;
  sum_lanes<D, S>(l, offset, rows, p, sum, square);
  for (int64_t k = 0; rows * MOMENT_LANES + k < m; ++k) {
    const double d = value<D, S>(l, offset + rows * MOMENT_LANES + k) - p;
    sum[k] += d;
    square[k] += d * d;
  }
  for (int width = MOMENT_LANES / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) {
      sum[k] += sum[k + width];
      square[k] += square[k + width];
    }
  const double shift = sum[0] / double(m), m2 = square[0] - sum[0] * shift;
  result[0] = p;
  result[1] = shift;
  result[2] = m2 < 0 ? 0 : m2;  // below the smallest number squares are zero and products are not
}

// acc += w x, with the roundings of combine
template <int D>
static void tile_add(const Layer& l, int64_t offset, int64_t m, void* acc) {
  constexpr int A = Accumulator<D>::dtype;
  char* at = static_cast<char*>(acc);
  int64_t i = offset;
  if constexpr (A == F64) {
    for (; i + LANES64 <= offset + m; i += LANES64)
      store(at + 8 * i, load_f64<A>(acc, i) + l.row_weight * load_f64<D>(l.row, i));
    for (; i < offset + m; ++i)
      store1<A>(acc, i, load1_f64<A>(acc, i) + l.row_weight * load1_f64<D>(l.row, i));
  } else {
    const float w = float(l.row_weight);
    for (; i + LANES <= offset + m; i += LANES)
      store(at + 4 * i, load_f32<A>(acc, i) + w * load_f32<D>(l.row, i));
    for (; i < offset + m; ++i) store1<A>(acc, i, load1<A>(acc, i) + w * load1<D>(l.row, i));
  }
}

template <int D>
static void tile(const MomentsArgs& a, const Layer& l, void* acc, int64_t offset, int64_t m,
                 double* result) {
  if (a.of == MOMENTS_BLEND && a.row_weight == 0)
    return tile_moments<D, SCALED_ACC>(l, offset, m, result);
  if (a.of == MOMENTS_BLEND) return tile_moments<D, BLEND>(l, offset, m, result);
  tile_moments<D, ROW>(l, offset, m, result);
  if (a.of == MOMENTS_ADD) tile_add<D>(l, offset, m, acc);  // the tile is in L1 by now
}

// ---- tiles to layers ---------------------------------------------------------------------------

struct Part {
  double count, mean, m2;
};

static Part join(const Part& a, const Part& b) {
  const double count = a.count + b.count, share = b.count / count, delta = b.mean - a.mean;
  if (!finite(a.mean) || !finite(b.mean)) return {count, a.mean + b.mean, __builtin_nan("")};
  return {count, a.mean + delta * share,
          (a.m2 + b.m2) + delta * delta * (a.count * share)};
}

// Joins tile i with tile i + stride for strides 1, 2, 4, ...; means relative to the first pivot
static void join_tiles(double* tiles, int64_t count, int64_t numel, double* mean, double* m2) {
  const auto values_of = [&](int64_t i, int64_t width) {
    const int64_t rest = numel - i * MOMENT_TILE;
    return double(rest < width * MOMENT_TILE ? rest : width * MOMENT_TILE);
  };
  for (int64_t i = 1; i < count; ++i) tiles[3 * i + 1] += tiles[3 * i] - tiles[0];
  for (int64_t stride = 1; stride < count; stride *= 2)
    for (int64_t i = 0; i + stride < count; i += 2 * stride) {
      double *left = tiles + 3 * i, *right = tiles + 3 * (i + stride);
      const Part whole = join({values_of(i, stride), left[1], left[2]},
                              {values_of(i + stride, stride), right[1], right[2]});
      left[1] = whole.mean;
      left[2] = whole.m2;
    }
  *mean = count ? tiles[0] + tiles[1] : 0;
  *m2 = count ? tiles[2] : 0;
}

static int64_t number_tiles(int64_t layers, const int64_t* numel, int64_t* first) {
  first[0] = 0;
  for (int64_t l = 0; l < layers; ++l)
    first[l + 1] = first[l] + (numel[l] + MOMENT_TILE - 1) / MOMENT_TILE;
  return first[layers];
}

static void merge(const MomentsArgs& a) {
  const int64_t tiles = number_tiles(a.layers, a.numel, a.first_tile);
  for (int64_t i = 0; i < a.n; ++i)
    for (int64_t l = 0; l < a.layers; ++l)
      join_tiles(a.tiles + 3 * (i * tiles + a.first_tile[l]), a.first_tile[l + 1] - a.first_tile[l],
                 a.numel[l], a.mean + i * a.layers + l, a.m2 + i * a.layers + l);
}

static void moments(const MomentsArgs& a) {
  const int64_t tiles = number_tiles(a.layers, a.numel, a.first_tile);
  for_chunks(a.n * tiles, a.threads, [&](int64_t t) {
    const int64_t i = t / tiles, in_row = t % tiles;
    const int64_t l = find_layer(a.first_tile, a.layers, in_row);
    const int64_t offset = (in_row - a.first_tile[l]) * MOMENT_TILE, rest = a.numel[l] - offset;
    const int64_t m = rest < MOMENT_TILE ? rest : MOMENT_TILE;
    void* acc = a.acc ? a.acc[l] : nullptr;
    const Layer layer{a.rows[i * a.layers + l], acc, a.acc_weight, a.row_weight};
    switch (a.dtype[l]) {
      case F64: return tile<F64>(a, layer, acc, offset, m, a.tiles + 3 * t);
      case F32: return tile<F32>(a, layer, acc, offset, m, a.tiles + 3 * t);
      case F16: return tile<F16>(a, layer, acc, offset, m, a.tiles + 3 * t);
      default: return tile<BF16>(a, layer, acc, offset, m, a.tiles + 3 * t);
    }
  });
  merge(a);
}

// ---- affine map --------------------------------------------------------------------------------

// Results at and above this become infinite in the type: half a step beyond its largest number.
template <int D>
FLCORE_INLINE double limit() {
  return D == F64 ? __builtin_inf() : D == F32 ? 0x1.ffffffp127 : D == F16 ? 65520.0 : 0x1.ffp127;
}

template <int D, int S>
static bool tile_affine(const Layer& l, double scale, double shift, void* out, int64_t offset,
                        int64_t m) {
  if (shift == 0) shift = -0.0;  // x + -0 is x for every x: scale 1 copies a zero of any sign
  vi64 bad = {};
  int64_t i = offset;
  for (; i + 2 * LANES64 <= offset + m; i += 2 * LANES64) {
    const vf64 a = scale * values<D, S>(l, i) + shift;
    const vf64 b = scale * values<D, S>(l, i + LANES64) + shift;
    bad |= ~((a < limit<D>()) & (a > -limit<D>()));  // true for NaN too
    bad |= ~((b < limit<D>()) & (b > -limit<D>()));
    store_pair<D>(out, i, a, b);
  }
  bool any = false;
  for (; i < offset + m; ++i) {
    const double a = scale * value<D, S>(l, i) + shift;
    any |= !(a < limit<D>() && a > -limit<D>());
    store1<D>(out, i, a);
  }
  for (int k = 0; k < LANES64; ++k) any |= bad[k] != 0;
  return any;
}

template <int D>
static bool tile(const AffineArgs& a, const Layer& l, int64_t layer, int64_t offset, int64_t m) {
  const double scale = a.scale[layer], shift = a.shift[layer];
  if (!a.acc) return tile_affine<D, ROW>(l, scale, shift, a.out[layer], offset, m);
  if (a.row_weight == 0)
    return tile_affine<D, SCALED_ACC>(l, scale, shift, a.out[layer], offset, m);
  return tile_affine<D, BLEND>(l, scale, shift, a.out[layer], offset, m);
}

static bool affine(const AffineArgs& a) {
  int bad = 0;
  for_chunks(number_tiles(a.layers, a.numel, a.first_tile), a.threads, [&](int64_t t) {
    const int64_t l = find_layer(a.first_tile, a.layers, t);
    const int64_t offset = (t - a.first_tile[l]) * MOMENT_TILE, rest = a.numel[l] - offset;
    const int64_t m = rest < MOMENT_TILE ? rest : MOMENT_TILE;
    const Layer layer{a.row[l], a.acc ? a.acc[l] : nullptr, a.acc_weight, a.row_weight};
    bool found;
    switch (a.dtype[l]) {
      case F64: found = tile<F64>(a, layer, l, offset, m); break;
      case F32: found = tile<F32>(a, layer, l, offset, m); break;
      case F16: found = tile<F16>(a, layer, l, offset, m); break;
      default: found = tile<BF16>(a, layer, l, offset, m);
    }
    if (found) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
  });
  return bad != 0;
}

}  // namespace FLCORE_ISA

extern const MomentsFns FLCORE_TABLE(moments);
const MomentsFns FLCORE_TABLE(moments) = {&FLCORE_ISA::moments, &FLCORE_ISA::merge,
                                          &FLCORE_ISA::affine};

}  // namespace flcore
