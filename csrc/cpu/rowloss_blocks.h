// What a row loss reads of ROW_BLOCK classes of a row, and how groups of them are formed: whole ones
// straight from memory; a group that holds the target, which the sums leave out, or the end of the
// row goes through a buffer, in which classes that take no part have a logit of -inf.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowmap.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t ROW_BLOCK = 4096;  // a block of float32 logits is half of the first-level cache

// What is read beside the logits: nothing; scale, margin and prior; and the weights u of the targets
// outside the comp-sum term as well.
enum RowForm : int { ROW_PLAIN = 0, ROW_AFFINE = 1, ROW_SPREAD = 2 };

// The classes [0, n) of a block; every pointer is that of its first class.
template <int D>
struct RowBlock {
  typedef typename RowCompute<D>::Number T;
  const char* x;
  int64_t n;
  int64_t hole;       // the target; -1: not here
  T scale, margin;
  const T* prior;     // or null
  const T* weight;    // or null
  const char* soft;   // or null
  T keep, spread;     // u = weight (keep soft + spread)
  const char* ahead;  // fetched as x is read
};

template <class V>
struct RowTerms {
  V z, prior, u;
};

// n values as float32, while those at `ahead` are fetched
template <int D>
FLCORE_NOINLINE static void row_floats(const char* x, const char* ahead, int64_t n,
                                       float* out) {
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    if (k % 32 == 0) __builtin_prefetch(ahead + dtype_bytes(D) * k, 0, 2);
    store(out + k, load_f32<D>(x, k));
  }
  for (; k < n; ++k) out[k] = load1<D>(x, k);
}

// The terms of one class, with a margin of its own: the target has none.
template <int D>
FLCORE_NOINLINE static RowTerms<typename RowCompute<D>::Number> row_term(
    const RowBlock<D>& b, int64_t k, typename RowCompute<D>::Number margin, bool softmax) {
  typedef typename RowCompute<D>::Number T;
  RowTerms<T> t{T(load1_f64<D>(b.x, k)) * b.scale + margin, T(1), b.spread};
  if (b.prior) {
    t.prior = b.prior[k];
    if (softmax) t.z = t.z + t.prior;
    if (t.prior == (softmax ? -T(__builtin_inf()) : T(0))) t.u = 0;
  }
  if (b.soft) t.u = t.u + T(load1_f64<D>(b.soft, k)) * b.keep;
  if (b.weight) t.u = t.u * b.weight[k];
  return t;
}

template <int D, int MAP, int FORM>
struct RowReader {
  typedef typename RowCompute<D>::Number T;
  typedef typename RowCompute<D>::Vector V;
  static constexpr int WIDTH = Real<V>::WIDTH, GROUP = ROW_GROUP<T>;
  // vectors that are mapped in lock step, as many as there are registers for
  static constexpr int PACK = FORM == ROW_SPREAD ? 1 : VEC_BYTES == 64 ? 4 : 2;
  static constexpr int VECTORS = GROUP / WIDTH;
  static constexpr bool EXP = MAP == ROW_SOFTMAX;
  static constexpr T INF = T(__builtin_inf()), MASKED = EXP ? -INF : T(0);

  static FLCORE_MEMBER V many(const char* p, int64_t k) {
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
        if (EXP) t.z = t.z + t.prior;
      }
    }
    if constexpr (FORM == ROW_SPREAD) {
      t.u = splat<V>(b.spread);
      if (b.prior) t.u = t.prior == MASKED ? V{} : t.u;
      if (b.soft) t.u = t.u + many(b.soft, k) * b.keep;
      if (b.weight) t.u = t.u * load<V>(b.weight + k);
    }
    return t;
  }
  // A group with a hole or past the end of the block.
  struct Odd {
    T z[GROUP], prior[GROUP], u[GROUP];
    FLCORE_MEMBER RowTerms<V> terms(int64_t j) const {
      return RowTerms<V>{load<V>(z + j), load<V>(prior + j), load<V>(u + j)};
    }
  };
  FLCORE_NOINLINE static void odd_group(const RowBlock<D>& b, int64_t begin, int64_t hole,
                                        Odd& odd) {
    int64_t j = 0;
    for (; j < GROUP && begin + j + WIDTH <= b.n; j += WIDTH) {
      const RowTerms<V> t = terms(b, begin + j);
      store(odd.z + j, t.z);
      store(odd.prior + j, t.prior);
      store(odd.u + j, t.u);
    }
    for (; j < GROUP; ++j) {
      const RowTerms<T> t = begin + j < b.n ? row_term<D>(b, begin + j, b.margin, EXP)
                                            : RowTerms<T>{-INF, T(0), T(0)};
      odd.z[j] = t.z;
      odd.prior[j] = t.prior;
      odd.u[j] = t.u;
    }
    if (hole >= begin && hole < begin + GROUP) {
      odd.z[hole - begin] = -INF;
      odd.u[hole - begin] = 0;
    }
  }

  // f and f' of a pack, with the prior
  template <bool SHIFTED>
  static FLCORE_MEMBER void map(const RowBlock<D>& b, const RowTerms<V> (&t)[PACK], V c, V n,
                                V (&f)[PACK], V (&d)[PACK]) {
    V z[PACK];
#pragma GCC unroll 4
    for (int i = 0; i < PACK; ++i) z[i] = t[i].z;
    row_map_lanes<MAP, SHIFTED>(z, c, n, f, d);
    if constexpr (FORM != ROW_PLAIN && !EXP)
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
    if constexpr (EXP) {
      g = t.z - m;
    } else {
      g = row_log_map<MAP>(t.z);
      if (b.prior) g = g + row_log(t.prior);
    }
    return t.u == V{} ? V{} : t.u * g;
  }

  // body(terms, k, first) for all packs, whose first vector is number `first` of the group at k;
  // group(k) before each group. FAST: in loops of their own for the two kinds of groups.
  template <bool FAST, class Group, class Body>
  static FLCORE_MEMBER void each(const RowBlock<D>& b, int64_t hole, const Group& group,
                                 const Body& body) {
    const int64_t with_hole = hole < 0 ? -1 : hole / GROUP * GROUP;
    Odd odd;
    for (int64_t k = 0; k < b.n; k += GROUP) {
      const bool whole = k != with_hole && k + GROUP <= b.n;
      if (FAST && !whole) continue;
      group(k);
      unroll<int(GROUP * dtype_bytes(D) / 64)>([&](auto j) FLCORE_LAMBDA {
        __builtin_prefetch(b.ahead + k * dtype_bytes(D) + 64 * j.value, 0, 2);
      });
      if (!FAST && !whole) odd_group(b, k, hole, odd);
#pragma GCC unroll 1
      for (int first = 0; first < VECTORS; first += PACK) {
        RowTerms<V> t[PACK];
        if (FAST || whole) {
#pragma GCC unroll 4
          for (int i = 0; i < PACK; ++i) t[i] = terms(b, k + (first + i) * WIDTH);
        } else {
#pragma GCC unroll 4
          for (int i = 0; i < PACK; ++i) t[i] = odd.terms((first + i) * WIDTH);
        }
        body(t, k, first);
      }
    }
    if (!FAST) return;
    group(b.n - GROUP);
    const int64_t tail = b.n / GROUP * GROUP;
    for (int64_t k = with_hole < 0 ? tail : with_hole; k < b.n; k = k < tail ? tail : b.n) {
      odd_group(b, k, hole, odd);
#pragma GCC unroll 1
      for (int first = 0; first < VECTORS; first += PACK) {
        RowTerms<V> t[PACK];
#pragma GCC unroll 4
        for (int i = 0; i < PACK; ++i) t[i] = odd.terms((first + i) * WIDTH);
        body(t, k, first);
      }
    }
  }
};

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
