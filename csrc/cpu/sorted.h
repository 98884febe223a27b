// What is done with the sorted values a[0] <= ... <= a[n - 1] of LANES coordinates, and how more
// values than one register network holds are sorted in the first-level cache.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/network.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

struct Plan {
  int op, median;
  int64_t n, f, keep;  // n values, after mixing
};

// ---- results -----------------------------------------------------------------------------------

template <class V>
FLCORE_INLINE V middle(const V& lower, const V& upper, int median) {
  if (median == MEDIAN_LOWER) return lower;
  if (median == MEDIAN_UPPER) return upper;
  return lower * 0.5f + upper * 0.5f;  // cannot overflow
}

// Sums run from the smallest value up and are divided once.
template <class V, class T>
FLCORE_INLINE V trimmed_mean(const V* a, int64_t n, int64_t f) {
  V sum = a[f];
  for (int64_t i = f + 1; i < n - f; ++i) sum = sum + a[i];
  return sum / (V{} + T(n - 2 * f));
}

// Mean of the `keep` values nearest to c: a window of the sorted order. Of the values r, r + keep,
// r + 2 keep, .. exactly one lies in the window; it moves up one step for as long as the value that
// enters is nearer than the one that leaves, that is, for as long as their midpoint lies below c,
// and that turns false once and for all. (Midpoints, not distances: those of the two middle values
// to their mean are equal, and rounding must not tell them apart.)
template <class V, class T>
FLCORE_INLINE V nearest_mean(const V* a, int64_t n, int64_t keep, const V& c) {
  V sum = {};
  for (int64_t r = 0; r < keep; ++r) {
    V pick = a[r];
    for (int64_t i = r; i + keep < n; i += keep)
      pick = a[i] * T(0.5) + a[i + keep] * T(0.5) < c ? a[i + keep] : pick;
    sum = sum + pick;
  }
  return sum / (V{} + T(keep));
}

template <class V, class T>
FLCORE_INLINE V statistic(const V* a, const Plan& p) {
  const int64_t n = p.n;
  V result;
  if (p.op == SELECT_TRIMMED_MEAN) {
    result = trimmed_mean<V, T>(a, n, p.f);
  } else {
    V c;
    if (p.op == SELECT_NEAR_TRIMMED)
      c = trimmed_mean<V, T>(a, n, p.f);
    else
      c = n % 2 ? a[n / 2] : middle(a[n / 2 - 1], a[n / 2], p.median);
    result = p.op == SELECT_MEDIAN ? c : nearest_mean<V, T>(a, n, p.keep, c);
  }
  return result + T(0);  // -0 becomes +0: networks do not order the two
}

// ---- sorting in memory -------------------------------------------------------------------------

// Any number of values: Batcher's network in place, the comparators that leave the array dropped.
template <class V>
static void sort_general(V* a, int64_t n) {
  for (int64_t size = 1; size < n; size *= 2)
    for (int64_t step = size; step > 0; step /= 2)
      for (int64_t start = step % size; start + step < n; start += 2 * step)
        for (int64_t i = start; i < start + step && i + step < n; ++i)
          if (i / (2 * size) == (i + step) / (2 * size)) exchange(a[i], a[i + step]);
}

// Sorts or merges Net::wires values at a, a + stride, ... in registers.
template <class Net>
static void network_in_place(vf32* a, int64_t stride) {
  vf32 v[Net::wires];
  unroll<Net::wires>([&](auto i) FLCORE_LAMBDA { v[i.value] = a[i.value * stride]; });
  run_network<Net>(v);
  unroll<Net::wires>([&](auto i)
                         FLCORE_LAMBDA { a[i.value * stride] = v[Net::net.order.at[i.value]]; });
}

typedef void (*NetworkFn)(vf32*, int64_t);

#define FLCORE_1_TO_16(X)                                                                         \
  X(1), X(2), X(3), X(4), X(5), X(6), X(7), X(8), X(9), X(10), X(11), X(12), X(13), X(14), X(15), \
      X(16)
#define FLCORE_17_TO_32(X)                                                                   \
  X(17), X(18), X(19), X(20), X(21), X(22), X(23), X(24), X(25), X(26), X(27), X(28), X(29), \
      X(30), X(31), X(32)
#define FLCORE_MERGE(b) &network_in_place<MergeNetwork<16, b>>
static const NetworkFn MERGE_16[17] = {nullptr, FLCORE_1_TO_16(FLCORE_MERGE)};
#undef FLCORE_MERGE

// Sorted positions that have to come out right; a median needs the middle alone.
struct Wanted {
  int64_t first, last;
};

// Merges sorted a[0 .. 31] with a[32 .. n - 1], at most 32 more. Values of one parity are merged in
// registers, 16 with at most 16; what they then lack is one exchange across neighbours.
static void merge_32(vf32* a, int64_t n, const Wanted& want) {
  for (int64_t q = 0; q < 2; ++q)
    if (const int64_t more = (n - 32 - q + 1) / 2) MERGE_16[more](a + q, 2);
  for (int64_t i = want.first > 2 ? (want.first - 1) | 1 : 1; i + 1 < n && i <= want.last; i += 2)
    exchange(a[i], a[i + 1]);
}

// Merges sorted a[0 .. 63] with a[64 .. n - 1], at most 64 more: four register merges of the values
// of one residue modulo 4, then exchanges at distances 2 and 1 in one sweep over blocks of four. An
// exchange at distance 1 wants both its values from distance 2: the sweep starts a block early.
static void merge_64(vf32* a, int64_t n, const Wanted& want) {
  for (int64_t q = 0; q < 4; ++q)
    if (const int64_t more = (n - 64 - q + 3) / 4) MERGE_16[more](a + q, 4);
  int64_t i = want.first > 10 ? (want.first - 3) / 4 * 4 - 2 : 2;
  for (; i + 3 < n; i += 4) {
    if (i > want.last + 2) return;
    vf32 w = a[i - 1], x0 = a[i], x1 = a[i + 1], x2 = a[i + 2], x3 = a[i + 3];
    exchange(x0, x2);
    exchange(x1, x3);
    exchange(w, x0);
    exchange(x1, x2);
    a[i - 1] = w;
    a[i] = x0;
    a[i + 1] = x1;
    a[i + 2] = x2;
    a[i + 3] = x3;
  }
  if (i + 2 < n) exchange(a[i], a[i + 2]);
  for (--i; i + 1 < n; i += 2) exchange(a[i], a[i + 1]);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
