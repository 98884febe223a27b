// The local steps of federated optimisation, and what surrounds them, over groups of tensors:
//   x <- x - lr (s (alpha g + q) + decay x),  s = min(1, clip / ||alpha g + q||),
// with momentum where wanted; norms; y = x + s v; u = x - w with a client's state in the same pass
// (api.h has all formulas). FedProx, SCAFFOLD, FedDyn, FedCM, FedSpeed and others are this step;
// they differ in q, which a client adds to every gradient of a round.
//
// Bytes a value, s those of the dtype: a step reads x, g, q and writes x (4 s; 3 s without q, 2 s
// more with momentum); the norm reads g and q before that (2 s), from cache where a group fits. A
// group belongs to one thread when there are enough of them, else its tiles are shared out. The second
// pass begins at the end, in spans of tiles, with what the first one left in cache.
//
// Exactness: arithmetic in float32, for float64 in float64, each operation rounded, no fma. Norms
// are float64 sums of squares that are exact for all but float64: a tile in 16 lanes, tiles in 128,
// then a tree. The same bits at every level and thread count.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/vec.h"
#include "cpu/wide.h"

namespace flcore {
namespace FLCORE_ISA {

namespace {

template <int D>
struct Real {
  typedef float Scalar;
  typedef vf32 Vector;
};
template <>
struct Real<F64> {
  typedef double Scalar;
  typedef vf64 Vector;
};

template <int D>
using Scalar = typename Real<D>::Scalar;
template <int D>
using Vector = typename Real<D>::Vector;

}  // namespace

// ---- one value and one vector ------------------------------------------------------------------

template <int D>
constexpr int WIDTH = D == F64 ? LANES64 : LANES;

// Loads and stores of a vector, or of one value: what a loop needs to be written once.
template <int D>
FLCORE_INLINE Vector<D> get(const void* p, int64_t i, const Vector<D>*) {
  if constexpr (D == F64)
    return load_f64<D>(p, i);
  else
    return load_f32<D>(p, i);
}
template <int D>
FLCORE_INLINE Scalar<D> get(const void* p, int64_t i, const Scalar<D>*) {
  if constexpr (D == F64)
    return load1_f64<D>(p, i);
  else
    return load1<D>(p, i);
}
template <int D>
FLCORE_INLINE void put(void* p, int64_t i, const Vector<D>& v) {
  store_lanes<D>(p, i, v);
}
template <int D>
FLCORE_INLINE void put(void* p, int64_t i, Scalar<D> v) {
  store1<D>(p, i, v);
}

// The numbers of a group in the type of the arithmetic; scale is 1 or from the norm.
template <int D>
struct Numbers {
  Scalar<D> rate, alpha, decay, momentum, scale;
};

template <int D>
static Numbers<D> numbers_of(const LocalNumbers& n, double scale) {
  return {Scalar<D>(n.rate), Scalar<D>(n.alpha), Scalar<D>(n.decay), Scalar<D>(n.momentum),
          Scalar<D>(scale)};
}

// alpha g + q, T a vector or one value
template <int D, bool Q, class T>
FLCORE_INLINE T direction(const void* g, const void* q, Scalar<D> alpha, int64_t i) {
  const T* kind = nullptr;
  const T v = alpha * get<D>(g, i, kind);
  if constexpr (Q) return v + get<D>(q, i, kind);
  return v;
}

// body(i, null vector) for whole vectors of [offset, offset + m), body(i, null value) for the rest
template <int D, class Body>
FLCORE_INLINE void each(int64_t offset, int64_t m, const Body& body) {
  constexpr int W = WIDTH<D>;
  const int64_t end = offset + m;
  int64_t i = offset;
#pragma GCC unroll 2
  for (; i + W <= end; i += W) body(i, static_cast<const Vector<D>*>(nullptr));
#pragma GCC unroll 1
  for (; i < end; ++i) body(i, static_cast<const Scalar<D>*>(nullptr));
}

// ---- norms -------------------------------------------------------------------------------------

// s + a a; the product is exact unless the dtype is float64
template <int D>
FLCORE_INLINE vf64 add_square(const vf64& s, const vf64& a) {
#if defined(__AVX512F__)
  if constexpr (D != F64) return (vf64)_mm512_fmadd_pd((__m512d)a, (__m512d)a, (__m512d)s);
#elif defined(__AVX2__)
  if constexpr (D != F64) return (vf64)_mm256_fmadd_pd((__m256d)a, (__m256d)a, (__m256d)s);
#endif
  return s + a * a;
}

// The halves of a float32 vector as float64.
FLCORE_INLINE void halves(const vf32& v, vf64& low, vf64& high) {
#if defined(__AVX512F__)
  low = widen((vf32h)_mm512_maskz_extractf32x8_ps(__mmask8(0xff), (__m512)v, 0));
  high = widen((vf32h)_mm512_maskz_extractf32x8_ps(__mmask8(0xff), (__m512)v, 1));
#elif defined(__AVX2__)
  low = (vf64)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
  high = (vf64)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#elif defined(__x86_64__)
  low = (vf64)_mm_cvtps_pd((__m128)v);
  high = (vf64)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
#else
  for (int k = 0; k < LANES64; ++k) {
    low[k] = double(v[k]);
    high[k] = double(v[LANES64 + k]);
  }
#endif
}

static double add_lanes(double* lane, int count) {
  for (int width = count / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
  return lane[0];
}

// Sum of squares of alpha g + q, with FULL of that + decay x, over m values.
template <int D, bool Q, bool FULL>
static double tile_squares(const void* x, const void* g, const void* q, const Numbers<D>& n,
                           int64_t offset, int64_t m) {
  constexpr int W = WIDTH<D>, VECTORS = LOCAL_LANES / LANES64;
  const int64_t whole = offset + m / LOCAL_LANES * LOCAL_LANES;
  vf64 sum[VECTORS] = {};
  for (int64_t i = offset; i < whole; i += LOCAL_LANES)
#pragma GCC unroll 16
    for (int k = 0; k < LOCAL_LANES / W; ++k) {
      const int64_t at = i + k * W;
      Vector<D> v = direction<D, Q, Vector<D>>(g, q, n.alpha, at);
      if constexpr (FULL) v = v + n.decay * get<D>(x, at, static_cast<Vector<D>*>(nullptr));
      if constexpr (D == F64) {
        sum[k] = add_square<D>(sum[k], v);
      } else {
        vf64 low, high;
        halves(v, low, high);
        sum[2 * k] = add_square<D>(sum[2 * k], low);
        sum[2 * k + 1] = add_square<D>(sum[2 * k + 1], high);
      }
    }
  double lane[LOCAL_LANES];
  for (int k = 0; k < VECTORS; ++k) store(lane + k * LANES64, sum[k]);
  for (int64_t i = whole; i < offset + m; ++i) {
    Scalar<D> v = direction<D, Q, Scalar<D>>(g, q, n.alpha, i);
    if constexpr (FULL) v = v + n.decay * get<D>(x, i, static_cast<Scalar<D>*>(nullptr));
    lane[i - whole] += double(v) * double(v);
  }
  return add_lanes(lane, LOCAL_LANES);
}

// ---- passes that write -------------------------------------------------------------------------

enum Buffer : int { NO_BUFFER = 0, FIRST_BUFFER = 1, OLD_BUFFER = 2 };

template <int D, bool Q, int B, bool NESTEROV>
static void tile_step(void* x, const void* g, const void* q, void* state, const Numbers<D>& n,
                      bool full, int64_t offset, int64_t m) {
  const Scalar<D> inner = full ? Scalar<D>(1) : n.scale, outer = full ? n.scale : Scalar<D>(1);
  each<D>(offset, m, [&](int64_t i, auto kind) FLCORE_LAMBDA {
    auto old = get<D>(x, i, kind);
    decltype(old) d = inner * direction<D, Q, decltype(old)>(g, q, n.alpha, i);
    d = outer * (d + n.decay * old);
    if constexpr (B != NO_BUFFER) {
      decltype(old) b = d;
      if constexpr (B == OLD_BUFFER) b = n.momentum * get<D>(state, i, kind) + d;
      put<D>(state, i, b);
      d = NESTEROV ? d + n.momentum * b : b;
    }
    put<D>(x, i, old - n.rate * d);
  });
}

template <int D, bool Q>
static void tile_shift(const void* x, const void* g, const void* q, void* out, const Numbers<D>& n,
                       int64_t offset, int64_t m) {
  each<D>(offset, m, [&](int64_t i, auto kind) FLCORE_LAMBDA {
    auto at = get<D>(x, i, kind);
    put<D>(out, i, at + n.scale * direction<D, Q, decltype(at)>(g, q, n.alpha, i));
  });
}

template <int D, int KIND>
static void tile_round(const void* x, const void* w, const void* c, void* state, void* out,
                       const Numbers<D>& n, int64_t offset, int64_t m) {
  each<D>(offset, m, [&](int64_t i, auto kind) FLCORE_LAMBDA {
    const auto u = get<D>(x, i, kind) - get<D>(w, i, kind);
    if constexpr (KIND == LOCAL_DUAL) put<D>(state, i, get<D>(state, i, kind) + u);
    if constexpr (KIND == LOCAL_CONTROL)
      put<D>(state, i, (get<D>(state, i, kind) - get<D>(c, i, kind)) - n.rate * u);
    put<D>(out, i, u);
  });
}

// ---- a tile of a piece -------------------------------------------------------------------------

template <int D, bool Q>
static double squares(const LocalArgs& a, int64_t p, const LocalNumbers& numbers, int64_t offset,
                      int64_t m) {
  const Numbers<D> n = numbers_of<D>(numbers, 1);
  const void* q = Q ? a.q[p] : nullptr;
  if (a.full && a.kind == LOCAL_STEP)
    return tile_squares<D, Q, true>(a.x[p], a.g[p], q, n, offset, m);
  return tile_squares<D, Q, false>(nullptr, a.g[p], q, n, offset, m);
}

template <int D, bool Q>
static void write(const LocalArgs& a, int64_t p, const LocalNumbers& numbers, double scale,
                  int64_t offset, int64_t m) {
  const Numbers<D> n = numbers_of<D>(numbers, scale);
  void* x = a.x[p];
  const void *g = a.g[p], *q = Q ? a.q[p] : nullptr;
  void* state = a.state ? a.state[p] : nullptr;
  void* out = a.out ? a.out[p] : nullptr;
  switch (a.kind) {
    case LOCAL_STEP:
      if (!state) return tile_step<D, Q, NO_BUFFER, false>(x, g, q, state, n, a.full, offset, m);
      if (a.first && a.nesterov)
        return tile_step<D, Q, FIRST_BUFFER, true>(x, g, q, state, n, a.full, offset, m);
      if (a.first)
        return tile_step<D, Q, FIRST_BUFFER, false>(x, g, q, state, n, a.full, offset, m);
      if (a.nesterov)
        return tile_step<D, Q, OLD_BUFFER, true>(x, g, q, state, n, a.full, offset, m);
      return tile_step<D, Q, OLD_BUFFER, false>(x, g, q, state, n, a.full, offset, m);
    case LOCAL_SHIFT:
    case LOCAL_SAM:
      return tile_shift<D, Q>(x, g, q, out, n, offset, m);
    case LOCAL_UPDATE:
      return tile_round<D, LOCAL_UPDATE>(x, g, nullptr, nullptr, out, n, offset, m);
    case LOCAL_DUAL:
      return tile_round<D, LOCAL_DUAL>(x, g, nullptr, state, out, n, offset, m);
    case LOCAL_CONTROL:
      if constexpr (Q) return tile_round<D, LOCAL_CONTROL>(x, g, q, state, out, n, offset, m);
      return;
    default:
      return;
  }
}

// ---- groups ------------------------------------------------------------------------------------

constexpr int64_t SPAN = 16;  // tiles that are gone through forwards, as processors expect it

namespace {

struct Local {
  const LocalArgs& a;

  bool needs_norm() const {
    return a.kind == LOCAL_NORM || a.kind == LOCAL_SAM || (a.kind == LOCAL_STEP && a.clipped);
  }

  // body(dtype as a constant, offset, length) of tile t, which lies in piece p
  template <class Body>
  void tile(int64_t p, int64_t t, const Body& body) const {
    const int64_t offset = (t - a.first_tile[p]) * LOCAL_TILE, rest = a.numel[p] - offset;
    const int64_t m = rest < LOCAL_TILE ? rest : LOCAL_TILE;
    switch (a.dtype[p]) {
      case F64: return body(Const<F64>(), offset, m);
      case F32: return body(Const<F32>(), offset, m);
      case F16: return body(Const<F16>(), offset, m);
      default: return body(Const<BF16>(), offset, m);
    }
  }

  double squares_of(int64_t k, int64_t p, int64_t t) const {
    double sum = 0;
    tile(p, t, [&](auto type, int64_t offset, int64_t m) {
      constexpr int D = decltype(type)::value;
      sum = a.q ? squares<D, true>(a, p, a.numbers[k], offset, m)
                : squares<D, false>(a, p, a.numbers[k], offset, m);
    });
    return sum;
  }

  void write_tile(int64_t k, int64_t p, int64_t t, double scale) const {
    tile(p, t, [&](auto type, int64_t offset, int64_t m) {
      constexpr int D = decltype(type)::value;
      if (a.q)
        write<D, true>(a, p, a.numbers[k], scale, offset, m);
      else
        write<D, false>(a, p, a.numbers[k], scale, offset, m);
    });
  }

  // What v is multiplied by: 1 or less of a step, the rate of a shift.
  double scale(int64_t k, double squares) const {
    const LocalNumbers& n = a.numbers[k];
    const double norm = __builtin_sqrt(squares);
    if (a.norms) a.norms[k] = norm;
    if (a.kind == LOCAL_SHIFT) return n.rate;
    if (!needs_norm() || (a.kind == LOCAL_STEP && norm <= n.clip)) return 1;
    if (norm - norm != 0) return __builtin_nan("");
    return a.kind == LOCAL_SAM ? n.rate / (norm + a.eps) : n.clip / norm;
  }

  int64_t first_piece(int64_t k) const { return a.first_piece[k]; }
  int64_t last_piece(int64_t k) const { return a.first_piece[k + 1]; }

  // Piece of tile t, at or after p or before it.
  int64_t forwards(int64_t p, int64_t t) const {
    while (t >= a.first_tile[p + 1]) ++p;
    return p;
  }
  int64_t backwards(int64_t p, int64_t t) const {
    while (t < a.first_tile[p]) --p;
    return p;
  }

  // Tiles [first, last) of a group, from the end in spans that are run through forwards.
  void write_tiles(int64_t k, int64_t first, int64_t last, double scale) const {
    int64_t p = last_piece(k) - 1;
    for (int64_t end = last; end > first; end -= SPAN) {
      const int64_t begin = end - SPAN > first ? end - SPAN : first;
      p = backwards(p, begin);
      for (int64_t t = begin, at = p; t < end; ++t) {
        at = forwards(at, t);
        write_tile(k, at, t, scale);
      }
    }
  }

  // One group, both passes.
  void whole(int64_t k) const {
    double lane[LOCAL_JOIN] = {};
    const int64_t begin = a.first_tile[first_piece(k)];
    if (needs_norm())
      for (int64_t p = first_piece(k); p < last_piece(k); ++p)
        for (int64_t t = a.first_tile[p]; t < a.first_tile[p + 1]; ++t)
          lane[(t - begin) % LOCAL_JOIN] += squares_of(k, p, t);
    const double s = scale(k, needs_norm() ? add_lanes(lane, LOCAL_JOIN) : 0);
    if (a.kind == LOCAL_NORM) return;
    write_tiles(k, begin, a.first_tile[last_piece(k)], s);
  }

  // One group, its tiles shared out among the threads: the same ones in both passes.
  void shared(int64_t k) const {
    const int64_t begin = a.first_tile[first_piece(k)];
    const int64_t tiles = a.first_tile[last_piece(k)] - begin;
    double lane[LOCAL_JOIN] = {};
    if (needs_norm()) {
      for_chunks(a.threads, a.threads, [&](int64_t thread) {
        int64_t p = first_piece(k);
        const int64_t end = begin + tiles * (thread + 1) / a.threads;
        for (int64_t t = begin + tiles * thread / a.threads; t < end; ++t) {
          p = forwards(p, t);
          a.tiles[t] = squares_of(k, p, t);
        }
      });
      for (int64_t t = 0; t < tiles; ++t) lane[t % LOCAL_JOIN] += a.tiles[begin + t];
    }
    const double s = scale(k, needs_norm() ? add_lanes(lane, LOCAL_JOIN) : 0);
    if (a.kind == LOCAL_NORM) return;
    for_chunks(a.threads, a.threads, [&](int64_t thread) {
      const int64_t end = begin + tiles * (thread + 1) / a.threads;
      write_tiles(k, begin + tiles * thread / a.threads, end, s);
    });
  }
};

}  // namespace

static void run(const LocalArgs& a) {
  const Local local{a};
  if (a.threads > 1 && a.count < a.threads && a.tiles) {
    for (int64_t i = 0; i < a.count; ++i) local.shared(a.group[i]);
    return;
  }
  for_chunks(a.count, a.threads, [&](int64_t i) { local.whole(a.group[i]); });
}

}  // namespace FLCORE_ISA

extern const LocalStepFns FLCORE_TABLE(local_step);
const LocalStepFns FLCORE_TABLE(local_step) = {&FLCORE_ISA::run};

}  // namespace flcore
