// One step of the pipeline of rowloss_rows.h: a block of one row is read and its f' is kept, while
// the same block of the row before, of which f' was kept and whose sums are known, is written.
// So memory is read and written at the same time, and every element is mapped once.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_blocks.h"
#include "cpu/rowloss_store.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// Writes factor * kept to a block of the gradient, in pieces: some entries up to a cache line, whole
// groups, the rest.
template <int D>
struct RowWriter {
  typedef typename RowCompute<D>::Number T;
  typedef typename RowCompute<D>::Vector V;
  static constexpr int WIDTH = int(sizeof(V) / sizeof(T)), GROUP = ROW_GROUP<T>;
  const T* kept;
  T factor;
  void* grad;
  int64_t n, at;
  bool stream;

  void start(const T* from, T by, void* to, int64_t count, bool past_caches) {
    kept = from, factor = by, grad = to, n = count, at = 0;
    const int64_t peel = past_caches ? row_peel<D>(grad) : -1;
    stream = peel >= 0;
    if (peel > 0) some(peel < n ? peel : n);
  }
  void some(int64_t end) {
    for (; at < end; ++at) store1<D>(grad, at, kept[at] * factor);
  }
  FLCORE_MEMBER void group() {
    const V by = splat<V>(factor);
    if (stream)
      unroll<GROUP / WIDTH>([&](auto i) FLCORE_LAMBDA {
        const int64_t k = at + i.value * WIDTH;
        row_stream<D>(grad, k, load<V>(kept + k) * by);
      });
    else
      unroll<GROUP / WIDTH>([&](auto i) FLCORE_LAMBDA {
        const int64_t k = at + i.value * WIDTH;
        row_store<D>(grad, k, load<V>(kept + k) * by);
      });
    at += GROUP;
  }
  // at least the entries below `end`
  FLCORE_MEMBER void until(int64_t end) {
    while (at < end && at < n)
      if (at + GROUP <= n)
        group();
      else
        some(n);
  }
};

// WRITE: w is a block of the row before, whose kept values the new ones replace.
template <int D, int MAP, int FORM, bool WRITE>
__attribute__((noinline)) static void block_step(
    const RowBlock<D>& b, RowPart<typename RowCompute<D>::Number>& part,
    typename RowCompute<D>::Number* kept, RowWriter<D>* writer) {
  typedef RowReader<D, MAP, FORM> R;
  typedef typename R::V V;
  constexpr int VECTORS = R::GROUP / R::WIDTH;
  V sum[VECTORS] = {};
  const V c = splat<V>(part.c), n = splat<V>(part.n);
  RowWriter<D> w{};
  if constexpr (WRITE) w = *writer;
  const auto keep = [&](const RowTerms<V>(&t)[R::PACK], auto pack, int64_t k) FLCORE_LAMBDA {
    V f[R::PACK], d[R::PACK];
    R::map(b, t, c, n, f, d);
    unroll<R::PACK>([&](auto i) FLCORE_LAMBDA {
      constexpr int at = pack.value * R::PACK + i.value;
      sum[at] += f[i.value];
      store(kept + k + at * R::WIDTH, d[i.value]);
    });
  };
  R::each_whole(b, [&](int64_t k) FLCORE_LAMBDA {
    if constexpr (WRITE)
      w.until(k + R::GROUP);
    if (b.ahead)
      unroll<int(R::GROUP * dtype_bytes(D) / 64)>([&](auto j) FLCORE_LAMBDA {
        __builtin_prefetch(b.ahead + k * dtype_bytes(D) + 64 * j.value, 0, 2);
      });
    unroll<R::PACKS>([&](auto pack) FLCORE_LAMBDA {
      RowTerms<V> t[R::PACK];
      R::terms(b, k + pack.value * R::PACK * R::WIDTH, t);
      keep(t, pack, k);
    });
  });
  if constexpr (WRITE) w.until(w.n);
  R::each_odd(b, [&](int64_t k) FLCORE_LAMBDA {
    typename R::Odd odd;
    R::odd_group(b, k, b.n, b.hole, odd);
    unroll<R::PACKS>([&](auto pack) FLCORE_LAMBDA {
      RowTerms<V> t[R::PACK];
      odd.terms(pack.value * R::PACK * R::WIDTH, t);
      keep(t, pack, k);
    });
  });
  part.sum = lane_total(sum);
  part.weight = part.moment = 0;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
