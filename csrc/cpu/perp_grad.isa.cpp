// Gradients without their component along the weights, written over the gradients:
//   c = w.g / (w.w + eps),   p = g - c w,   out = p ||g|| / (||p|| + eps)
// over each tensor, or with the dot products of all tensors. (Prieto et al., "Grokking at the Edge
// of Numerical Stability", ICLR 2025, arXiv 2501.04697.)
//
// Sums read w and g once (2 s bytes, s = bytes of the dtype), the result reads them again and
// writes g (3 s). Tensors are taken in groups that fit into the last-level cache, and a thread goes
// backwards over its tiles the second time, so that most of the second read finds them in cache.
//
// ||p||^2 = gg - c (2 wg - c ww) cancels where g is nearly parallel to w; below 1e-8 gg a third pass
// measures it. What then remains below 1e-13 ||g|| is rounding of the sums: the result is 0. Below
// floor ||g|| the result is p itself, because its rounding errors would be stretched with it.
//
// Exactness: everything in float64, the result rounded once. A tile is summed in 16 lanes, tiles in
// 128, then a tree: the same bits at every level and thread count. Products of float32 and narrower
// values are exact in float64, so that a fused multiply-add rounds as the two operations do.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/layers.h"
#include "cpu/vec.h"
#include "cpu/wide.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t GROUP_BYTES = 12 << 20;  // of weights and gradients that stay in cache together

// ---- one tile ----------------------------------------------------------------------------------

// s + a b, where a b is exact unless D is F64
template <int D>
FLCORE_INLINE vf64 add_product(const vf64& s, const vf64& a, const vf64& b) {
#if defined(__AVX512F__)
  if constexpr (D != F64) return (vf64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)s);
#elif defined(__AVX2__)
  if constexpr (D != F64) return (vf64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)s);
#endif
  return s + a * b;
}

static double add_lanes(double* lane, int count) {
  for (int width = count / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
  return lane[0];
}

// Where 16 lanes of three sums do not fit into the registers, some of the lanes take their turn
// after the others.
constexpr int VECTORS = PERP_LANES / LANES64 < 4 ? PERP_LANES / LANES64 : 4;

// sums[0 .. 2] = w.w, w.g, g.g over m values
template <int D>
static void tile_sums(const void* w, const void* g, int64_t offset, int64_t m, double* sums) {
  double ww[PERP_LANES], wg[PERP_LANES], gg[PERP_LANES];
  const int64_t whole = offset + m / PERP_LANES * PERP_LANES;
  for (int first = 0; first < PERP_LANES; first += VECTORS * LANES64) {
    vf64 s1[VECTORS] = {}, s2[VECTORS] = {}, s3[VECTORS] = {};
    for (int64_t i = offset + first; i < whole; i += PERP_LANES)
#pragma GCC unroll 4
      for (int k = 0; k < VECTORS; ++k) {
        const vf64 a = load_wide<D>(w, i + k * LANES64), b = load_wide<D>(g, i + k * LANES64);
        s1[k] = add_product<D>(s1[k], a, a);
        s2[k] = add_product<D>(s2[k], a, b);
        s3[k] = add_product<D>(s3[k], b, b);
      }
    for (int k = 0; k < VECTORS; ++k) {
      store(ww + first + k * LANES64, s1[k]);
      store(wg + first + k * LANES64, s2[k]);
      store(gg + first + k * LANES64, s3[k]);
    }
  }
  for (int64_t i = whole; i < offset + m; ++i) {
    const double a = load1_f64<D>(w, i), b = load1_f64<D>(g, i);
    ww[i - whole] += a * a;
    wg[i - whole] += a * b;
    gg[i - whole] += b * b;
  }
  sums[0] = add_lanes(ww, PERP_LANES);
  sums[1] = add_lanes(wg, PERP_LANES);
  sums[2] = add_lanes(gg, PERP_LANES);
}

// sum[0] = ||g - c w||^2 over m values
template <int D>
static void tile_rest(const void* w, const void* g, double c, int64_t offset, int64_t m,
                      double* sum) {
  double square[PERP_LANES];
  const int64_t whole = offset + m / PERP_LANES * PERP_LANES;
  for (int first = 0; first < PERP_LANES; first += VECTORS * LANES64) {
    vf64 s[VECTORS] = {};
    for (int64_t i = offset + first; i < whole; i += PERP_LANES)
#pragma GCC unroll 4
      for (int k = 0; k < VECTORS; ++k) {
        const int64_t at = i + k * LANES64;
        const vf64 p = load_wide<D>(g, at) - c * load_wide<D>(w, at);
        s[k] += p * p;
      }
    for (int k = 0; k < VECTORS; ++k) store(square + first + k * LANES64, s[k]);
  }
  for (int64_t i = whole; i < offset + m; ++i) {
    const double p = load1_f64<D>(g, i) - c * load1_f64<D>(w, i);
    square[i - whole] += p * p;
  }
  sum[0] = add_lanes(square, PERP_LANES);
}

// g = alpha (g - c w); alpha 0 stands for a result that is nothing but rounding
template <int D>
static void tile_apply(const void* w, void* g, double c, double alpha, int64_t offset, int64_t m) {
  const int64_t end = offset + m;
  int64_t i = offset;
  if (alpha == 0) {
    __builtin_memset(static_cast<char*>(g) + dtype_bytes(D) * i, 0, size_t(dtype_bytes(D) * m));
    return;
  }
#pragma GCC unroll 2
  for (; i + 2 * LANES64 <= end; i += 2 * LANES64) {
    const vf64 p = load_wide<D>(g, i) - c * load_wide<D>(w, i);
    const vf64 q = load_wide<D>(g, i + LANES64) - c * load_wide<D>(w, i + LANES64);
    store_pair<D>(g, i, alpha * p, alpha * q);
  }
  for (; i < end; ++i)
    store1<D>(g, i, alpha * (load1_f64<D>(g, i) - c * load1_f64<D>(w, i)));
}

template <int D>
static void visit(const PerpGradArgs& a, int step, int64_t l, const PerpFactors& f, int64_t offset,
                  int64_t m, double* tile) {
  const void* w = a.weight[l];
  if (step == PERP_SUMS) return tile_sums<D>(w, a.grad[l], offset, m, tile);
  if (step == PERP_REST) return tile_rest<D>(w, a.grad[l], f.c, offset, m, tile);
  tile_apply<D>(w, a.grad[l], f.c, f.alpha, offset, m);
}

// ---- tiles to tensors --------------------------------------------------------------------------

// Column `column` of `count` rows of 3: row t to lane t % PERP_JOIN in order, then a tree of lanes.
static double join(const double* rows, int64_t count, int column) {
  double lane[PERP_JOIN] = {};
  for (int64_t t = 0; t < count; ++t) lane[t % PERP_JOIN] += rows[3 * t + column];
  return add_lanes(lane, PERP_JOIN);
}

// c, and alpha from ||p||^2: the closed form, or what was measured.
static PerpFactors factors(const PerpGradArgs& a, const double* sums, const double* rest) {
  const double ww = sums[0], wg = sums[1], gg = sums[2];
  if (wg == 0 || ww + a.eps == 0) return {0, 1, false, false};  // w = 0, g = 0 or p = g
  const double c = wg / (ww + a.eps);
  double pp = gg - c * (2 * wg - c * ww);
  const bool cancels = pp < PERP_CANCELS * gg;
  if (cancels && !rest) return {c, 1, true, true};
  if (cancels) pp = rest[0];
  if (pp <= PERP_NOTHING * PERP_NOTHING * gg) return {c, 0, true, false};
  if (!a.renormalize || pp < a.floor * a.floor * gg) return {c, 1, true, false};
  return {c, __builtin_sqrt(gg) / (__builtin_sqrt(pp) + a.eps), true, false};
}

namespace {  // member functions of a class with a name would be weak symbols

// The steps of tensors [first, last), whose tiles are numbered from 0 in a.first_tile.
struct Group {
  const PerpGradArgs& a;
  int64_t first, last;

  int64_t number_tiles() const {
    a.first_tile[first] = 0;
    for (int64_t l = first; l < last; ++l)
      a.first_tile[l + 1] = a.first_tile[l] + (a.numel[l] + PERP_TILE - 1) / PERP_TILE;
    return a.first_tile[last];
  }

  // Every tile of the tensors that need the step, each thread the same ones in every step.
  void run(int step, bool backwards) const {
    for_ranges(number_tiles(), a.threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t n = 0; n < end - begin; ++n) {
        const int64_t t = backwards ? end - 1 - n : begin + n;
        const int64_t l = first + find_layer(a.first_tile + first, last - first, t);
        const PerpFactors& f = a.factors[a.global ? 0 : l];
        if (step == PERP_REST ? !f.measure : step == PERP_APPLY ? !f.apply : false) continue;
        const int64_t offset = (t - a.first_tile[l]) * PERP_TILE, rest = a.numel[l] - offset;
        const int64_t m = rest < PERP_TILE ? rest : PERP_TILE;
        double* tile = a.tiles + 3 * t;
        switch (a.dtype[l]) {
          case F64: visit<F64>(a, step, l, f, offset, m, tile); break;
          case F32: visit<F32>(a, step, l, f, offset, m, tile); break;
          case F16: visit<F16>(a, step, l, f, offset, m, tile); break;
          default: visit<BF16>(a, step, l, f, offset, m, tile);
        }
      }
    });
  }

  const double* tiles_of(int64_t l) const { return a.tiles + 3 * a.first_tile[l]; }
  int64_t count_of(int64_t l) const { return a.first_tile[l + 1] - a.first_tile[l]; }

  void sums() const {
    run(PERP_SUMS, false);
    for (int64_t l = first; l < last; ++l)
      for (int column = 0; column < 3; ++column)
        a.sums[3 * l + column] = join(tiles_of(l), count_of(l), column);
  }

  // Fills a.factors; whether a third pass is needed. `measured`: a.rest holds what it found.
  bool decide(bool measured) const {
    bool measure = false;
    if (a.global) {
      double sums[3];
      for (int column = 0; column < 3; ++column) sums[column] = join(a.sums, a.layers, column);
      const double rest = measured ? join(a.rest, a.layers, 0) : 0;
      a.factors[0] = factors(a, sums, measured ? &rest : nullptr);
      return a.factors[0].measure;
    }
    for (int64_t l = first; l < last; ++l) {
      a.factors[l] = factors(a, a.sums + 3 * l, measured ? a.rest + 3 * l : nullptr);
      measure |= a.factors[l].measure;
    }
    return measure;
  }

  void rest() const {
    run(PERP_REST, true);
    for (int64_t l = first; l < last; ++l)
      a.rest[3 * l] = a.factors[a.global ? 0 : l].measure ? join(tiles_of(l), count_of(l), 0) : 0;
  }

  void project() const {
    sums();
    const bool measure = decide(false);
    if (measure) {
      rest();
      decide(true);
    }
    run(PERP_APPLY, !measure);
  }
};

}  // namespace

static void project(const PerpGradArgs& a) {
  if (a.global) return Group{a, 0, a.layers}.project();
  for (int64_t first = 0; first < a.layers;) {
    int64_t last = first, bytes = 0;
    do
      bytes += 2 * dtype_bytes(a.dtype[last]) * a.numel[last];
    while (++last < a.layers &&
           bytes + 2 * dtype_bytes(a.dtype[last]) * a.numel[last] <= GROUP_BYTES);
    Group{a, first, last}.project();
    first = last;
  }
}

static bool perp_grad(const PerpGradArgs& a) {
  const Group all{a, 0, a.layers};
  switch (a.step) {
    case PERP_SUMS:
      all.sums();
      return false;
    case PERP_REST: {
      const bool measure = all.decide(false);
      if (measure) all.rest();
      return measure;
    }
    case PERP_APPLY:
      all.decide(true);
      all.run(PERP_APPLY, false);
      return false;
    default:
      project(a);
      return false;
  }
}

}  // namespace FLCORE_ISA

extern const PerpGradFns FLCORE_TABLE(perp_grad);
const PerpGradFns FLCORE_TABLE(perp_grad) = {&FLCORE_ISA::perp_grad};

}  // namespace flcore
