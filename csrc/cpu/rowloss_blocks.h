// Blocks of ROW_BLOCK classes of a row: sums of the element map, and the gradient's entries.
//
// Class k goes to lane k % ROW_GROUP of its block; lanes are added up in float32 as far as 16 (8 in
// float64) and in float64 from there, blocks one after the other: an order that neither the level
// nor the threads change. The groups that hold the target or the end of the row come last; there,
// classes that do not take part have a logit of -inf.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowmap.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t ROW_BLOCK = 4096;  // a block of float32 logits is half of the first-level cache

template <class T>
constexpr int ROW_GROUP = int(256 / sizeof(T));

// What is read beside the logits: nothing; scale, margin and prior; and the weights u of the targets
// outside the comp-sum term as well.
enum RowForm : int { ROW_PLAIN = 0, ROW_AFFINE = 1, ROW_SPREAD = 2 };

// The classes [0, n) of a block; every pointer is that of its first class.
template <int D>
struct RowBlock {
  typedef typename RowCompute<D>::Number T;
  const void* x;
  int64_t n;
  int64_t hole;         // the target, which the sums leave out; -1: not here
  T scale, margin;
  const T* prior;       // or null
  const T* weight;      // or null
  const void* soft;     // or null
  T keep, spread;       // u = weight (keep soft + spread)
  const char* ahead;    // prefetched as x is read; null: nothing is
};

// What the sums of a block are: multiples of 2^n exp(c) for softmax, whose largest logit is m.
template <class T>
struct RowPart {
  double sum, weight, moment;  // of e; of u; of u (g - m)
  T m, c, n;
};

template <class V>
struct RowTerms {
  V z, prior, u;
};

template <int D, int MAP, int FORM>
struct RowReader {
  typedef typename RowCompute<D>::Number T;
  typedef typename RowCompute<D>::Vector V;
  static constexpr int WIDTH = int(sizeof(V) / sizeof(T)), GROUP = ROW_GROUP<T>;
  static constexpr T INF = T(__builtin_inf());
  // vectors that are mapped in lock step, as many as there are registers for
  static constexpr int PACK = VEC_BYTES == 64 ? 4 : 2, PACKS = GROUP / WIDTH / PACK;

  static FLCORE_MEMBER T one(const void* p, int64_t k) {
    if constexpr (D == F64)
      return load1_f64<F64>(p, k);
    else
      return load1<D>(p, k);
  }
  static FLCORE_MEMBER V many(const void* p, int64_t k) {
    if constexpr (D == F64)
      return load_f64<F64>(p, k);
    else
      return load_f32<D>(p, k);
  }

  static FLCORE_MEMBER RowTerms<V> terms(const RowBlock<D>& b, int64_t k) {
    RowTerms<V> t{many(b.x, k), V{}, V{}};
    if constexpr (FORM != ROW_PLAIN) {
      t.z = t.z * b.scale + b.margin;
      if (b.prior) {
        t.prior = load<V>(b.prior + k);
        if (MAP == ROW_SOFTMAX) t.z = t.z + t.prior;
      }
    }
    if constexpr (FORM == ROW_SPREAD) {
      t.u = splat<V>(b.spread);
      if (b.prior) t.u = t.prior == (MAP == ROW_SOFTMAX ? -INF : 0) ? V{} : t.u;
      if (b.soft) t.u = t.u + many(b.soft, k) * b.keep;
      if (b.weight) t.u = t.u * load<V>(b.weight + k);
    }
    return t;
  }

  static FLCORE_MEMBER void terms(const RowBlock<D>& b, int64_t k, RowTerms<V> (&t)[PACK]) {
#pragma GCC unroll 4
    for (int i = 0; i < PACK; ++i) t[i] = terms(b, k + i * WIDTH);
  }

  // The same of one class; `own`: of the target, which the margin spares.
  static FLCORE_MEMBER RowTerms<T> term(const RowBlock<D>& b, int64_t k, bool own) {
    RowTerms<T> t{one(b.x, k), T(0), T(0)};
    if constexpr (FORM != ROW_PLAIN) {
      t.z = t.z * b.scale + (own ? T(0) : b.margin);
      if (b.prior) {
        t.prior = b.prior[k];
        if (MAP == ROW_SOFTMAX) t.z = t.z + t.prior;
      }
    }
    if constexpr (FORM == ROW_SPREAD) {
      t.u = b.spread;
      if (b.prior && t.prior == (MAP == ROW_SOFTMAX ? -INF : 0)) t.u = 0;
      if (b.soft) t.u = t.u + one(b.soft, k) * b.keep;
      if (b.weight) t.u = t.u * b.weight[k];
    }
    return t;
  }

  // A group with a hole or past the end of the block.
  struct Odd {
    T z[GROUP], prior[GROUP], u[GROUP];
    FLCORE_MEMBER RowTerms<V> terms(int64_t j) const {
      return RowTerms<V>{load<V>(z + j), load<V>(prior + j), load<V>(u + j)};
    }
    FLCORE_MEMBER void terms(int64_t j, RowTerms<V> (&t)[PACK]) const {
#pragma GCC unroll 4
      for (int i = 0; i < PACK; ++i) t[i] = terms(j + i * WIDTH);
    }
  };
  __attribute__((noinline)) static void odd_group(const RowBlock<D>& b, int64_t begin, int64_t end, int64_t hole, Odd& odd) {
    for (int64_t j = 0; j < GROUP; ++j) {
      RowTerms<T> t{-INF, T(0), T(0)};
      if (begin + j < end && begin + j != hole) t = term(b, begin + j, false);
      odd.z[j] = t.z;
      odd.prior[j] = t.prior;
      odd.u[j] = t.u;
    }
  }

  // f and f' with the prior, of a pack
  static FLCORE_MEMBER void map(const RowBlock<D>& b, const RowTerms<V> (&t)[PACK], V c, V n,
                                V (&f)[PACK], V (&d)[PACK]) {
    V z[PACK];
#pragma GCC unroll 4
    for (int i = 0; i < PACK; ++i) z[i] = t[i].z;
    row_map_lanes<MAP>(z, c, n, f, d);
    if constexpr (FORM != ROW_PLAIN && MAP != ROW_SOFTMAX)
      if (b.prior) {
#pragma GCC unroll 4
        for (int i = 0; i < PACK; ++i) {
          f[i] = f[i] * t[i].prior;
          d[i] = d[i] * t[i].prior;
        }
      }
  }

  // u (g - m)
  static FLCORE_MEMBER V moment(const RowBlock<D>& b, const RowTerms<V>& t, V m) {
    V g;
    if constexpr (MAP == ROW_SOFTMAX) {
      g = t.z - m;
    } else {
      g = row_log_map<MAP>(t.z);
      if (b.prior) g = g + row_log(t.prior);
    }
    return t.u == V{} ? V{} : t.u * g;
  }

  // Calls body(terms, k) for the vectors of whole groups without the hole, odd(group) for the rest.
  template <class Body>
  static FLCORE_MEMBER void each_whole(const RowBlock<D>& b, const Body& body) {
    const int64_t hole = b.hole < 0 ? -1 : b.hole / GROUP * GROUP;
    for (int64_t k = 0; k + GROUP <= b.n; k += GROUP)
      if (k != hole) body(k);
  }
  template <class Body>
  static FLCORE_MEMBER void each_odd(const RowBlock<D>& b, const Body& body) {
    const int64_t hole = b.hole < 0 ? -1 : b.hole / GROUP * GROUP, tail = b.n / GROUP * GROUP;
    if (hole >= 0) body(hole);
    if (tail < b.n && tail != hole) body(tail);
  }
};

// Lane sums of a block into one float64.
template <class V>
FLCORE_INLINE double lane_total(V* acc) {
  typedef typename Real<V>::T T;
  constexpr int WIDTH = Real<V>::WIDTH, KEPT = sizeof(T) == 4 ? 16 : 8;
#pragma GCC unroll 8
  for (int h = ROW_GROUP<T> / WIDTH / 2; h * WIDTH >= KEPT; h /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < h; ++i) acc[i] += acc[i + h];
  T lanes[KEPT];
#pragma GCC unroll 8
  for (int i = 0; i < KEPT / WIDTH; ++i) store(lanes + i * WIDTH, acc[i]);
  double sum[KEPT];
  for (int l = 0; l < KEPT; ++l) sum[l] = double(lanes[l]);
  for (int h = KEPT / 2; h; h /= 2)
    for (int l = 0; l < h; ++l) sum[l] += sum[l + h];
  return sum[0];
}

// Largest z of a block without its hole; NaN is left to the sums.
template <int D, int FORM>
__attribute__((noinline)) static typename RowCompute<D>::Number block_max(const RowBlock<D>& b) {
  typedef RowReader<D, ROW_SOFTMAX, FORM == ROW_SPREAD ? int(ROW_AFFINE) : FORM> R;
  typedef typename R::V V;
  constexpr int VECTORS = R::GROUP / R::WIDTH;
  V most[4];
  for (int i = 0; i < 4; ++i) most[i] = splat<V>(-R::INF);
  R::each_whole(b, [&](int64_t k) FLCORE_LAMBDA {
    unroll<VECTORS>([&](auto i) FLCORE_LAMBDA {
      most[i.value % 4] = vmax(R::terms(b, k + i.value * R::WIDTH).z, most[i.value % 4]);
    });
  });
  R::each_odd(b, [&](int64_t k) FLCORE_LAMBDA {
    typename R::Odd odd;
    R::odd_group(b, k, b.n, b.hole, odd);
    for (int j = 0; j < R::GROUP; j += R::WIDTH) most[0] = vmax(load<V>(odd.z + j), most[0]);
  });
  const V all = vmax(vmax(most[0], most[1]), vmax(most[2], most[3]));
  typename R::T m = all[0];
  for (int l = 1; l < R::WIDTH; ++l) m = all[l] > m ? all[l] : m;
  return m;
}

// The scale of a block's terms.
template <int D, int MAP, int FORM>
static void block_shift(const RowBlock<D>& b, RowPart<typename RowCompute<D>::Number>& part) {
  part.m = part.c = part.n = 0;
  if constexpr (MAP == ROW_SOFTMAX) {
    part.m = block_max<D, FORM>(b);
    // without a class that counts every shift does
    if (part.m > -RowReader<D, MAP, FORM>::INF) row_shift(part.m, part.c, part.n);
  }
}

// Sums of a block, given m, c and n.
template <int D, int MAP, int FORM>
__attribute__((noinline)) static void block_sums(
    const RowBlock<D>& b, RowPart<typename RowCompute<D>::Number>& part) {
  typedef RowReader<D, MAP, FORM> R;
  typedef typename R::V V;
  constexpr int VECTORS = R::GROUP / R::WIDTH;
  V sum[VECTORS] = {}, weight[VECTORS] = {}, moment[VECTORS] = {};
  const bool shifted = part.m > -R::INF;
  const V c = splat<V>(part.c), n = splat<V>(part.n), m = splat<V>(shifted ? part.m : 0);
  const auto add = [&](const RowTerms<V>(&t)[R::PACK], auto pack) FLCORE_LAMBDA {
    V f[R::PACK], d[R::PACK];
    R::map(b, t, c, n, f, d);
    unroll<R::PACK>([&](auto i) FLCORE_LAMBDA {
      constexpr int at = pack.value * R::PACK + i.value;
      sum[at] += f[i.value];
      if constexpr (FORM == ROW_SPREAD) {
        weight[at] += t[i.value].u;
        moment[at] += R::moment(b, t[i.value], m);
      }
    });
  };
  R::each_whole(b, [&](int64_t k) FLCORE_LAMBDA {
    unroll<R::PACKS>([&](auto pack) FLCORE_LAMBDA {
      RowTerms<V> t[R::PACK];
      R::terms(b, k + pack.value * R::PACK * R::WIDTH, t);
      add(t, pack);
    });
  });
  R::each_odd(b, [&](int64_t k) FLCORE_LAMBDA {
    typename R::Odd odd;
    R::odd_group(b, k, b.n, b.hole, odd);
    unroll<R::PACKS>([&](auto pack) FLCORE_LAMBDA {
      RowTerms<V> t[R::PACK];
      odd.terms(pack.value * R::PACK * R::WIDTH, t);
      add(t, pack);
    });
  });
  part.sum = lane_total(sum);
  part.weight = part.moment = 0;
  if constexpr (FORM == ROW_SPREAD) {
    part.weight = lane_total(weight);
    part.moment = lane_total(moment) + part.weight * double(shifted ? part.m : 0);
  }
}

// The gradient of a block from its logits into `entries`: common f' - spread u rho. The target's
// entry is not its own one yet. Whole groups are written.
template <int D, int MAP, int FORM>
__attribute__((noinline)) static void block_gradient(
    const RowBlock<D>& b, typename RowCompute<D>::Number c, typename RowCompute<D>::Number n,
    typename RowCompute<D>::Number common, typename RowCompute<D>::Number spread,
    typename RowCompute<D>::Number* entries) {
  typedef RowReader<D, MAP, FORM> R;
  typedef typename R::V V;
  const V cs = splat<V>(c), ns = splat<V>(n);
  const auto pack = [&](const RowTerms<V>(&t)[R::PACK], int64_t k) FLCORE_LAMBDA {
    V f[R::PACK], d[R::PACK];
    R::map(b, t, cs, ns, f, d);
    unroll<R::PACK>([&](auto i) FLCORE_LAMBDA {
      V g = d[i.value] * common;
      if constexpr (FORM == ROW_SPREAD) {
        const V rho = row_rho<MAP>(t[i.value].z);
        g = g - (rho == V{} ? V{} : t[i.value].u * spread * rho);
      }
      store(entries + k + i.value * R::WIDTH, g);
    });
  };
  int64_t k = 0;
  for (; k + R::GROUP <= b.n; k += R::GROUP)
    unroll<R::PACKS>([&](auto i) FLCORE_LAMBDA {
      const int64_t at = k + i.value * R::PACK * R::WIDTH;
      RowTerms<V> t[R::PACK];
      R::terms(b, at, t);
      pack(t, at);
    });
  if (k < b.n) {
    typename R::Odd odd;
    R::odd_group(b, k, b.n, -1, odd);
    unroll<R::PACKS>([&](auto i) FLCORE_LAMBDA {
      RowTerms<V> t[R::PACK];
      odd.terms(i.value * R::PACK * R::WIDTH, t);
      pack(t, k + i.value * R::PACK * R::WIDTH);
    });
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
