// Order statistics of the values of one coordinate, for kernels/select.cu: sorting networks in
// registers, merging in shared memory, and what is done with the sorted values. Every operation is
// that of csrc/cpu/sorted.h, rounded by itself, so the results have its bits.
#pragma once

#include <utility>

#include "common.cuh"

#define FLCORE_ISA cuda  // the namespace of the constants in batcher.h
#include "batcher.h"
#undef FLCORE_ISA

namespace flcore {
namespace cuda {

struct SelectPlan {
  int op, median;  // SelectOp, MedianOf
  int n, f, keep;  // n values, after mixing
};

// ---- arithmetic: one rounding each, never contracted -------------------------------------------

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double sub(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return __ddiv_rn(a, b); }

__device__ __forceinline__ float least(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float greatest(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double least(double a, double b) { return fmin(a, b); }
__device__ __forceinline__ double greatest(double a, double b) { return fmax(a, b); }

template <class T>
__device__ __forceinline__ T infinity() {
  return T(__uint_as_float(0x7f800000u));
}

// ---- networks in registers ---------------------------------------------------------------------

// One compare-exchange on the wires v, all indices constants.
template <class Net, int I, class T>
__device__ __forceinline__ void exchange(T* v) {
  constexpr int A = Net::net.low[I], B = Net::net.high[I], K = Net::net.keep[I];
  const T a = v[A], b = v[B];
  if constexpr ((K & KEEP_LOW) != 0) v[A] = least(a, b);
  if constexpr ((K & KEEP_HIGH) != 0) v[B] = greatest(a, b);
}

template <class Net, class T, int... I>
__device__ __forceinline__ void exchange_all([[maybe_unused]] T* v,
                                             std::integer_sequence<int, I...>) {
  (exchange<Net, I>(v), ...);
}

template <class Net, int I>
struct WireOf {  // of sorted position I
  static constexpr int value = Net::net.order.at[I];
};

template <class Net, int FIRST, class T, int... I>
__device__ __forceinline__ void take(const T* v, T* a, std::integer_sequence<int, I...>) {
  ((a[FIRST + I] = v[WireOf<Net, FIRST + I>::value]), ...);
}

// Runs a network on v, then a[FIRST] .. a[LAST] <- these sorted positions.
template <class Net, int FIRST, int LAST, class T>
__device__ __forceinline__ void run_network(T* v, T* a) {
  exchange_all<Net>(v, std::make_integer_sequence<int, Net::net.count>());
  take<Net, FIRST>(v, a, std::make_integer_sequence<int, LAST - FIRST + 1>());
}

// ---- sorted columns in shared memory -----------------------------------------------------------

// The values of one coordinate, a thread's own: neighbouring threads lie in neighbouring banks
// whatever index each of them uses.
template <class T>
struct Column {
  T* base;
  int stride;
  __device__ __forceinline__ T& operator[](int i) const { return base[i * stride]; }
};

// Sorts a[first] .. a[first + n - 1], n <= W; missing wires hold infinity, which stays behind them.
template <int W, class T>
__device__ __forceinline__ void sort_run(const Column<T>& a, int first, int n) {
  typedef SortNetwork<W> Net;
  T v[W], sorted[W];
#pragma unroll
  for (int i = 0; i < W; ++i) v[i] = i < n ? a[first + i] : infinity<T>();
  run_network<Net, 0, W - 1>(v, sorted);
#pragma unroll
  for (int i = 0; i < W; ++i)
    if (i < n) a[first + i] = sorted[i];
}

// to[first] .. to[end - 1] <- sorted runs first .. middle - 1 and middle .. end - 1 merged. A run
// that is used up counts as infinity; the number of steps is fixed, so that an infinity of the other
// run is written as often as it is there.
template <class T>
__device__ __forceinline__ void merge(const Column<T>& from, const Column<T>& to, int first,
                                      int middle, int end) {
  int i = first, j = middle;
  T x = from[i], y = j < end ? from[j] : infinity<T>();
  for (int k = first; k < end; ++k) {
    const bool left = x <= y;
    to[k] = left ? x : y;
    if (left) {
      ++i;
      x = i < middle ? from[i] : infinity<T>();
    } else {
      ++j;
      y = j < end ? from[j] : infinity<T>();
    }
  }
}

constexpr int RUN = 32;  // values sorted in registers at once

// Sorts a[0] .. a[n - 1] with the help of b and returns the one of the two that holds the result.
template <class T>
__device__ __forceinline__ Column<T> sort_column(Column<T> a, Column<T> b, int n) {
  for (int first = 0; first < n; first += RUN) {
    const int length = min(RUN, n - first);
    if (length > 16)
      sort_run<RUN>(a, first, length);
    else if (length > 8)
      sort_run<16>(a, first, length);
    else
      sort_run<8>(a, first, length);
  }
  for (int run = RUN; run < n; run *= 2) {
    for (int first = 0; first < n; first += 2 * run)
      merge(a, b, first, min(first + run, n), min(first + 2 * run, n));
    const Column<T> other = a;
    a = b;
    b = other;
  }
  return a;
}

// ---- results -----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T midpoint(T a, T b) {  // cannot overflow
  return add(mul(a, T(0.5)), mul(b, T(0.5)));
}

template <class T>
__device__ __forceinline__ T middle_of(T lower, T upper, int median) {
  return median == MEDIAN_LOWER ? lower : median == MEDIAN_UPPER ? upper : midpoint(lower, upper);
}

// `a` is a Column or, fully unrolled, an array in registers. -0 + x is x for every x, a zero of
// either sign included: a sum that starts from its first term.
template <class T, class Sorted>
__device__ __forceinline__ T trimmed_mean(const Sorted& a, int n, int f) {
  T sum = T(-0.0);
#pragma unroll 4
  for (int i = f; i < n - f; ++i) sum = add(sum, a[i]);
  return quotient(sum, T(n - 2 * f));
}

template <int N, class T>
__device__ __forceinline__ T trimmed_mean(const T (&a)[N], int f) {
  T sum = T(-0.0);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i >= f && i < N - f) sum = add(sum, a[i]);
  return quotient(sum, T(N - 2 * f));
}

// Mean of the `keep` values nearest to c: a window of the sorted order. Of the values r, r + keep,
// r + 2 keep, .. exactly one lies in the window; it moves up one step for as long as the midpoint
// of the value that leaves and the one that enters lies below c, which turns false once and for all.
template <class T>
__device__ __forceinline__ T nearest_mean(const Column<T>& a, int n, int keep, T c) {
  T sum = T(0);
  for (int r = 0; r < keep; ++r) {
    T leaves = a[r], pick = leaves;
    for (int i = r; i + keep < n; i += keep) {
      const T enters = a[i + keep];
      if (midpoint(leaves, enters) < c) pick = enters;
      leaves = enters;
    }
    sum = add(sum, pick);
  }
  return quotient(sum, T(keep));
}

template <class T>
__device__ __forceinline__ T statistic(const Column<T>& a, const SelectPlan& p) {
  T c;
  if (p.op == SELECT_TRIMMED_MEAN || p.op == SELECT_NEAR_TRIMMED)
    c = trimmed_mean<T>(a, p.n, p.f);
  else
    c = p.n % 2 ? a[p.n / 2] : middle_of(a[p.n / 2 - 1], a[p.n / 2], p.median);
  return p.op >= SELECT_NEAR_MEDIAN ? nearest_mean(a, p.n, p.keep, c) : c;
}

}  // namespace cuda
}  // namespace flcore
