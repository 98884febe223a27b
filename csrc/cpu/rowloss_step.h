// Blocks of classes: their sums, with f' kept for later, and gradients.
//
// Class k of a block goes to lane k % ROW_GROUP; lanes are added up in float32 as far as 16 (8 in
// float64) and in float64 from there: an order that neither the level nor the threads change.
//
// The exponentials of softmax are first taken without a shift. They are good if the block's largest
// logit, found on the way, is of moderate size; otherwise the block is done again, shifted by it.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_blocks.h"
#include "cpu/rowloss_store.h"
#include "cpu/rowmap.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// What is known of a block: its sums, of which those of softmax are multiples of 2^n exp(c), and its
// largest logit m.
template <class T>
struct RowPart {
  double sum, weight, moment;  // of e, u and u g without the target's
  T m, c, n;
};

// How the gradient of a row is made of f' (softmax: exp(z - c) 2^-n) and u rho.
template <class T>
struct RowSlope {
  T c, n, common, spread;
};

// Shift of exponentials up to exp(m): none while they stay within exp(-8) and exp(40), so that all
// down to exp(-79) of the largest are normal numbers and a sum of them is finite.
template <class T>
FLCORE_INLINE void block_shift(T m, T& c, T& n) {
  c = n = 0;
  if (!(m >= -8 && m <= 40)) row_shift(m, c, n);
}

// Lane sums into one float64.
template <class V>
FLCORE_NOINLINE static double lane_total(V* acc) {
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
#pragma GCC unroll 16
  for (int l = 0; l < KEPT; ++l) sum[l] = double(lanes[l]);
#pragma GCC unroll 4
  for (int h = KEPT / 2; h; h /= 2)
#pragma GCC unroll 8
    for (int l = 0; l < h; ++l) sum[l] += sum[l + h];
  return sum[0];
}

// Sums of a block; f' goes to `kept` unless that is null. SHIFTED: m, c and n are given; else softmax
// looks for m. FUSED: the writer writes what stood in `kept` before.
template <int D, int MAP, int FORM, bool SHIFTED, bool FUSED>
FLCORE_NOINLINE static void block_pass(const RowBlock<D>& b,
                                       RowPart<typename RowCompute<D>::Number>& part,
                                       typename RowCompute<D>::Number* kept,
                                       RowWriter<D>* writer) {
  typedef RowReader<D, MAP, FORM> R;
  typedef typename R::V V;
  constexpr bool SEARCH = R::EXP && !SHIFTED, SPREAD = FORM == ROW_SPREAD;
  V sum[R::VECTORS] = {}, weight[SPREAD ? R::VECTORS : 1] = {}, moment[SPREAD ? R::VECTORS : 1] = {};
  V most[R::PACK];
#pragma GCC unroll 4
  for (int i = 0; i < R::PACK; ++i) most[i] = splat<V>(-R::INF);
  const V c = splat<V>(part.c), n = splat<V>(part.n), m = splat<V>(part.m);
  RowWriter<D> w{};
  if constexpr (FUSED) w = *writer;
  R::template each<FORM != ROW_SPREAD>(
      b, b.hole,
      [&](int64_t k) FLCORE_LAMBDA {
        if constexpr (FUSED) w.until(k + R::GROUP);
        (void)k;
      },
      [&](const RowTerms<V>(&t)[R::PACK], int64_t k, int first) FLCORE_LAMBDA {
        V f[R::PACK], d[R::PACK];
        R::template map<SHIFTED>(b, t, c, n, f, d);
#pragma GCC unroll 4
        for (int i = 0; i < R::PACK; ++i) {
          sum[first + i] += f[i];
          if (FUSED || kept) store(kept + k + (first + i) * R::WIDTH, d[i]);
          if constexpr (SEARCH) most[i] = vmax(t[i].z, most[i]);
          if constexpr (SPREAD) {
            weight[first + i] += t[i].u;
            moment[first + i] += R::moment(b, t[i], m);
          }
        }
      });
  if constexpr (FUSED) w.until(w.n);
  part.sum = lane_total(sum);
  part.weight = part.moment = 0;
  if constexpr (SPREAD) {
    part.weight = lane_total(weight);
    part.moment = lane_total(moment) + part.weight * double(part.m);
  }
  if constexpr (SEARCH) {
    V all = most[0];
    for (int i = 1; i < R::PACK; ++i) all = vmax(all, most[i]);
    part.m = all[0];
    for (int l = 1; l < R::WIDTH; ++l) part.m = all[l] > part.m ? all[l] : part.m;
  }
}

// The whole of a block's sums.
template <int D, int MAP, int FORM, bool FUSED>
static void block_sums(const RowBlock<D>& b, RowPart<typename RowCompute<D>::Number>& part,
                       typename RowCompute<D>::Number* kept, RowWriter<D>* writer) {
  part.m = part.c = part.n = 0;
  block_pass<D, MAP, FORM, false, FUSED>(b, part, kept, writer);
  if constexpr (MAP == ROW_SOFTMAX) {
    // -inf: no class that counts, or NaN alone
    if (part.m > -__builtin_inf()) block_shift(part.m, part.c, part.n);
    // sums of u (g - m) are the more exact the smaller g - m is
    const bool far = FORM == ROW_SPREAD && part.m > -__builtin_inf() && !(part.m >= -8 && part.m <= 8);
    if (far || part.c != 0 || part.n != 0)
      block_pass<D, MAP, FORM, true, false>(b, part, kept, nullptr);
  }
}

// The gradient of a block from its logits into `entries`, whole groups: common f' - spread u rho, but
// for the target, whose entry the writer knows. A writer, if there is one, follows on the heels.
template <int D, int MAP, int FORM>
FLCORE_NOINLINE static void block_gradient(
    const RowBlock<D>& b, const RowSlope<typename RowCompute<D>::Number>& by,
    typename RowCompute<D>::Number* entries, RowWriter<D>* writer) {
  typedef RowReader<D, MAP, FORM> R;
  typedef typename R::V V;
  const V c = splat<V>(by.c), n = splat<V>(by.n);
  RowWriter<D> w{};
  if (writer) w = *writer;
  R::template each<false>(
      b, -1, [&](int64_t k) FLCORE_LAMBDA { w.until(k - R::GROUP + 1); },
      [&](const RowTerms<V>(&t)[R::PACK], int64_t k, int first) FLCORE_LAMBDA {
        V f[R::PACK], d[R::PACK];
        R::template map<true>(b, t, c, n, f, d);
#pragma GCC unroll 4
        for (int i = 0; i < R::PACK; ++i) {
          V g = d[i] * by.common;
          if constexpr (FORM == ROW_SPREAD) {
            const V rho = row_rho<MAP>(t[i].z);
            g = g - (rho == V{} ? V{} : t[i].u * by.spread * rho);
          }
          store(entries + k + (first + i) * R::WIDTH, g);
        }
      });
  w.until(w.n);
}

// ---- choice of the functions --------------------------------------------------------------------

template <int D>
using RowSumsFn = void (*)(const RowBlock<D>&, RowPart<typename RowCompute<D>::Number>&,
                           typename RowCompute<D>::Number*, RowWriter<D>*);

template <int D>
using RowGradientFn = void (*)(const RowBlock<D>&, const RowSlope<typename RowCompute<D>::Number>&,
                               typename RowCompute<D>::Number*, RowWriter<D>*);

// All of what there is, for the compute types.
template <int D>
struct RowKernels {
  RowSumsFn<D> sums;
  RowGradientFn<D> gradient;
};

template <int D, int FORM>
static RowKernels<D> row_kernels(int map) {
  if (map == ROW_SOFTMAX)
    return {block_sums<D, ROW_SOFTMAX, FORM, false>, block_gradient<D, ROW_SOFTMAX, FORM>};
  if (map == ROW_STABLEMAX)
    return {block_sums<D, ROW_STABLEMAX, FORM, false>, block_gradient<D, ROW_STABLEMAX, FORM>};
  return {block_sums<D, ROW_TAYLOR, FORM, false>, block_gradient<D, ROW_TAYLOR, FORM>};
}
template <int D>
static RowKernels<D> row_kernels(const RowLossArgs& a) {
  if (a.soft || a.smoothing != 0) return row_kernels<D, ROW_SPREAD>(a.map);
  return row_kernels<D, ROW_AFFINE>(a.map);
}

// What is used most, from the stored type: labels and logits and nothing else. Null: none.
template <int D>
struct RowDirect {
  RowSumsFn<D> sums, step;  // step writes as well
  RowGradientFn<D> gradient;
};

template <int D>
static RowDirect<D> row_direct(const RowLossArgs& a) {
  if constexpr (D != F64) {
    const bool plain = !a.soft && a.smoothing == 0 && !a.prior && a.margin == 0 &&
                       a.logit_scale == 1 && !a.row_scale;
    if (plain && a.map == ROW_SOFTMAX)
      return {block_sums<D, ROW_SOFTMAX, ROW_PLAIN, false>,
              block_sums<D, ROW_SOFTMAX, ROW_PLAIN, true>,
              block_gradient<D, ROW_SOFTMAX, ROW_PLAIN>};
    if (plain && a.map == ROW_STABLEMAX)
      return {block_sums<D, ROW_STABLEMAX, ROW_PLAIN, false>,
              block_sums<D, ROW_STABLEMAX, ROW_PLAIN, true>,
              block_gradient<D, ROW_STABLEMAX, ROW_PLAIN>};
  }
  return {nullptr, nullptr, nullptr};
}

}  // namespace FLCORE_ISA
}  // namespace flcore
