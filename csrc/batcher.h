// Sorting networks known at compile time: Batcher's odd-even merge sort for any number of wires,
// pruned to the sorted positions that are asked for (K. E. Batcher, "Sorting networks and their
// applications", AFIPS 1968). python/flcore/reference/select.py writes the same network.
// Nothing but constants comes out of it, for csrc/cpu/network.h and kernels/network.cuh; FLCORE_ISA
// names the namespace they live in, so that no two objects share a symbol.
#pragma once

#include <cstdint>

namespace flcore {
namespace FLCORE_ISA {

constexpr int NETWORK_WIRES = 32, NETWORK_SIZE = 192;  // 32 wires take 191 compare-exchanges

struct Wires {
  int n = 0;
  uint8_t at[NETWORK_WIRES] = {};

  constexpr void push(int wire) { at[n++] = uint8_t(wire); }
};

enum Keep : uint8_t { KEEP_NONE = 0, KEEP_LOW = 1, KEEP_HIGH = 2, KEEP_BOTH = 3 };

struct Network {
  int count = 0;
  uint8_t low[NETWORK_SIZE] = {}, high[NETWORK_SIZE] = {};  // wires of the smaller, larger value
  uint8_t keep[NETWORK_SIZE] = {};                          // Keep: which of the two is needed
  Wires order;                                              // wires from the smallest value up

  constexpr void exchange(int a, int b) {
    low[count] = uint8_t(a);
    high[count] = uint8_t(b);
    keep[count++] = KEEP_BOTH;
  }
};

constexpr Wires every_other(const Wires& x, int first) {
  Wires half;
  for (int i = first; i < x.n; i += 2) half.push(x.at[i]);
  return half;
}

// Wires of two sorted lists in sorted order.
constexpr Wires merge_wires(Network& net, const Wires& a, const Wires& b) {
  if (a.n == 0) return b;
  if (b.n == 0) return a;
  Wires all;
  if (a.n == 1 && b.n == 1) {
    net.exchange(a.at[0], b.at[0]);
    all.push(a.at[0]);
    all.push(b.at[0]);
    return all;
  }
  const Wires v = merge_wires(net, every_other(a, 0), every_other(b, 0));
  const Wires w = merge_wires(net, every_other(a, 1), every_other(b, 1));
  all.push(v.at[0]);
  int i = 0;
  for (; i < w.n && i + 1 < v.n; ++i) {
    net.exchange(w.at[i], v.at[i + 1]);
    all.push(w.at[i]);
    all.push(v.at[i + 1]);
  }
  for (int k = i; k < w.n; ++k) all.push(w.at[k]);
  for (int k = i + 1; k < v.n; ++k) all.push(v.at[k]);
  return all;
}

constexpr Wires sort_wires(Network& net, int first, int n) {
  if (n == 1) {
    Wires one;
    one.push(first);
    return one;
  }
  const int half = (n + 1) / 2;
  const Wires a = sort_wires(net, first, half), b = sort_wires(net, first + half, n - half);
  return merge_wires(net, a, b);
}

// Backwards: an exchange is needed where a later one, or the result, needs what it puts there.
constexpr void prune(Network& net, int first, int last) {
  bool needed[NETWORK_WIRES] = {};
  for (int i = first; i <= last; ++i) needed[net.order.at[i]] = true;
  Network kept;
  for (int i = net.count - 1; i >= 0; --i) {
    const int a = net.low[i], b = net.high[i];
    net.keep[i] = uint8_t((needed[a] ? KEEP_LOW : 0) | (needed[b] ? KEEP_HIGH : 0));
    if (net.keep[i]) needed[a] = needed[b] = true;
  }
  kept.order = net.order;
  for (int i = 0; i < net.count; ++i)
    if (net.keep[i]) {
      kept.exchange(net.low[i], net.high[i]);
      kept.keep[kept.count - 1] = net.keep[i];
    }
  net = kept;
}

// Sorts N wires; only the sorted positions FIRST .. LAST need to come out right.
template <int N, int FIRST = 0, int LAST = N - 1>
struct SortNetwork {
  static constexpr int wires = N;
  static constexpr Network make() {
    Network net;
    net.order = sort_wires(net, 0, N);
    if (FIRST > 0 || LAST < N - 1) prune(net, FIRST, LAST);
    return net;
  }
  static constexpr Network net = make();
};

// Merges sorted wires 0 .. A - 1 with sorted wires A .. A + B - 1.
template <int A, int B>
struct MergeNetwork {
  static constexpr int wires = A + B;
  static constexpr Network make() {
    Network net;
    Wires a, b;
    for (int i = 0; i < A; ++i) a.push(i);
    for (int i = 0; i < B; ++i) b.push(A + i);
    net.order = merge_wires(net, a, b);
    return net;
  }
  static constexpr Network net = make();
};

}  // namespace FLCORE_ISA
}  // namespace flcore
