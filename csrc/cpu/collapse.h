// How many rows of logits have lost their loss to rounding, in one read of the logits (Prieto et
// al., "Grokking at the Edge of Numerical Stability", ICLR 2025): with u the unit roundoff and m
// the largest logit of a row,
//   softmax collapse: E = sum_{j != m} exp(z_j - m) <= u, so that the softmax sum rounds to 1
//   zero loss:        a collapsed row whose target has the largest logit
//   StableMax:        R = sum_{j != y} s(z_j) <= u s(z_y)
// A block is visited twice in the cache closest to the core: for its largest value, then for sums.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/rowmap.h"
#include "cpu/value_blocks.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

template <class V>
FLCORE_NOINLINE static double block_top(const typename Real<V>::T* z, int64_t n) {
  typedef typename Real<V>::T T;
  V top = splat<V>(T(-__builtin_inf()));
  for (int64_t i = 0; i < n; i += Real<V>::WIDTH) {
    const V x = load<V>(z + i);
    top = x > top ? x : top;
  }
  double most = -__builtin_inf();
  for (int k = 0; k < Real<V>::WIDTH; ++k) most = double(top[k]) > most ? double(top[k]) : most;
  return most;
}

template <class T>
static double add_lanes(const T* lane, int count) {
  double s[16];
  for (int k = 0; k < count; ++k) s[k] = double(lane[k]);
  for (int width = count / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) s[k] += s[k + width];
  return s[0];
}

// Sum of exp(z - m) over values that are not m, and how many are.
template <class V>
FLCORE_NOINLINE static void block_exp(const typename Real<V>::T* z, int64_t n, double m,
                                      double& sum, double& equal) {
  typedef typename Real<V>::T T;
  constexpr int WIDTH = Real<V>::WIDTH, COUNT = 64 / int(sizeof(T));
  T sums[COUNT], equals[COUNT];
  const V top = splat<V>(T(m)), one = splat<V>(1);
  for (int first = 0; first < COUNT; first += WIDTH) {
    V s = {}, e = {};
    for (int64_t i = first; i < n; i += COUNT) {
      const V x = load<V>(z + i);
      const auto is_top = x == top;
      s += is_top ? V{} : row_exp(x - top, V{});
      e += is_top ? one : V{};
    }
    store(sums + first, s);
    store(equals + first, e);
  }
  sum = add_lanes(sums, COUNT);
  equal = add_lanes(equals, COUNT);
}

// Sum of s(z), and the largest |z| of values that are not masked.
template <class V>
FLCORE_NOINLINE static double block_stablemax(const typename Real<V>::T* z, int64_t n,
                                              double& largest) {
  typedef typename Real<V>::T T;
  constexpr int WIDTH = Real<V>::WIDTH, COUNT = 64 / int(sizeof(T));
  T sums[COUNT];
  const V masked = splat<V>(T(-__builtin_inf()));
  V most = {};
  for (int first = 0; first < COUNT; first += WIDTH) {
    V s = {}, f, d;
    for (int64_t i = first; i < n; i += COUNT) {
      const V x = load<V>(z + i), size = x == masked ? V{} : vabs(x);
      row_map<ROW_STABLEMAX>(x, V{}, V{}, f, d);
      s += f;
      most = size > most ? size : most;
    }
    store(sums + first, s);
  }
  for (int k = 0; k < WIDTH; ++k) largest = double(most[k]) > largest ? double(most[k]) : largest;
  return add_lanes(sums, COUNT);
}

template <class V>
static void collapse_row(const CollapseArgs& a, int64_t row, int64_t y, CollapseCounts& found) {
  typedef typename Real<V>::T T;
  T block[BLOCK];
  double m = -__builtin_inf(), others = 0, rest = 0, own = 0;
  for (int64_t first = 0; first < a.classes; first += BLOCK) {
    const int64_t left = a.classes - first, n = left < BLOCK ? left : BLOCK;
    const T* z = fetch_block(a.dtype, a.x, row * a.row_stride + first, n, block,
                             T(-__builtin_inf()));
    const double top = block_top<V>(z, padded<T>(n));
    const bool higher = top > m;
    if (higher) {
      if (others > 0 || m > -__builtin_inf()) others = (others + 1) * row_exp_full(m - top);
      m = top;
    }
    if (m > -__builtin_inf()) {
      double sum, equal;
      block_exp<V>(z, padded<T>(n), m, sum, equal);
      others += sum + (higher ? equal - 1 : equal);
    }
    if (y >= first && y < first + n) {
      own = double(z[y - first]);
      if (z != block) __builtin_memcpy(block, z, size_t(n) * sizeof(T));
      block[y - first] = T(-__builtin_inf());
      z = block;
    }
    rest += block_stablemax<V>(z, padded<T>(n), found.largest);
  }
  const double size = (own < 0 ? -own : own) + 1, s = own >= 0 ? size : 1 / size;
  const bool finite = m > -__builtin_inf() && m < __builtin_inf();
  const bool collapsed = finite && others <= a.unit;
  if (own > -__builtin_inf() && size - 1 > found.largest) found.largest = size - 1;
  if (!(rest + s == rest + s)) found.has_nan = true;
  ++found.rows;
  found.collapsed += collapsed;
  found.zero_loss += collapsed && own == m;
  found.stablemax += finite && rest <= a.unit * s;
}

template <class V>
static void collapse_rows(const CollapseArgs& a) {
  for_chunks(a.tasks, a.threads, [&](int64_t task) {
    CollapseCounts found{};
    const int64_t end = a.rows * (task + 1) / a.tasks;
    for (int64_t row = a.rows * task / a.tasks; row < end; ++row)
      if (a.labels[row] != a.ignore_index) collapse_row<V>(a, row, a.labels[row], found);
    a.found[task] = found;
  });
}

static void collapse(const CollapseArgs& a) {
  if (a.dtype == F64)
    collapse_rows<vf64>(a);
  else
    collapse_rows<vf32>(a);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
