// Weighted sums of packets, a block of coordinates at a time: the packets are added one after
// another to sums in cache, which begin with +0 or a state and are handed on layer by layer without
// going to memory. A sum has the order and the bits of the sum of decoded rows (cpu/sums.h), except
// that it is never -0.
#pragma once

#include "api.h"
#include "cpu/chunks.h"
#include "cpu/packets.h"
#include "cpu/sums.h"

namespace flcore {
namespace FLCORE_ISA {

// How the sums of a block lie in memory: coordinate i at `unit` i bytes in the type of its layer,
// where all layers have the same type; else a layer's part begins at 8 times its place in the
// block. In bins, coordinate i is at b * TILE_BINS + i of doubles.
struct SumPlan {
  int64_t size, unit;  // coordinates of a block
  bool bins, fused;    // fused: the decoder adds; else rows are decoded and added
  int dtype;           // of fused sums
};

template <class Wide>
static SumPlan plan_sums(const CombineArgs& a, const Wide& wide) {
  int64_t wides = 0;
  bool sparse = false;
  for (int64_t l = 0; l < a.layers; ++l) wides += wide(l);
  for (int64_t i = 0; i < a.n; ++i) sparse |= a.packets[i].codec == CODEC_SPARSE;
  const bool bins = a.accumulate == ACC_REPRODUCIBLE;
  const bool fused = !bins && !a.by_layer && (wides == 0 || wides == a.layers);
  const int64_t size = bins ? TILE_BINS : fused && sparse ? SPARSE_TILE : BLOCK_MAX;
  return {size, wides || bins ? 8 : 4, bins, fused, wides ? F64 : F32};
}

static int64_t sum_bytes(const SumPlan& plan) { return 8 * plan.size * (plan.bins ? 3 : 1); }

// The packets in order, added by their decoder.
static void add_fused(const CombineArgs& a, const SumPlan& plan, int64_t begin, int64_t end,
                      char* sums) {
  const int64_t total = a.starts[a.layers], starts[2] = {0, total};
  void* out = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(sums) -
                                      uintptr_t(plan.unit * begin));  // where coordinate 0 would be
  const DecodeArgs args{total, a.n, a.packets, 1, starts, &plan.dtype, &out, 1};
  FLCORE_TABLE(decode).add_part(args, begin, end);
}

// The packets in order, each decoded and added; returns CombineFlags.
template <class Wide>
static int add_decoded(const CombineArgs& a, const SumPlan& plan, const Wide& wide, int64_t begin,
                       int64_t end, char* sums) {
  alignas(64) float row[BLOCK_MAX], work[DECODE_WORK];
  bool range = false;
  for (int64_t i = 0; i < a.n; ++i) {
    decode_rows(a.packets + i, 1, begin, end - begin, row, 0, work);
    for_pieces(a.starts, a.layers, begin, end, [&](int64_t l, int64_t, int64_t first, int64_t m) {
      const void* x = row;
      const double w = a.by_layer ? a.weights[i * a.layers + l] : a.weights[i];
      const Rows one{&x, 1, nullptr, &w, 1, 1};
      char* at = sums + plan.unit * first;
      if (plan.bins)
        range |= add_row_bins<F32>(row + first, w, 0, nullptr, reinterpret_cast<double*>(at), m);
      else if (wide(l))
        add_rows<F32>(one, first, reinterpret_cast<double*>(at), m, false);
      else
        add_rows<F32>(one, first, reinterpret_cast<float*>(at), m, false);
    });
  }
  return range ? COMBINE_OUT_OF_RANGE : 0;
}

// finish(layer, offset, count, sums) for parts of layers of at most BLOCK_MAX coordinates, sums
// float or double as wide(layer) says; returns the CombineFlags of both.
template <class Wide, class Finish>
static int sum_block(const CombineArgs& a, const SumPlan& plan, const Wide& wide, int64_t begin,
                     int64_t end, char* sums, const Finish& finish) {
  __builtin_memset(sums, 0, size_t(plan.bins ? sum_bytes(plan) : plan.unit * (end - begin)));
  if (a.state)
    for_pieces(a.starts, a.layers, begin, end,
               [&](int64_t l, int64_t offset, int64_t first, int64_t m) {
                 const int64_t bytes = wide(l) ? 8 : 4;
                 __builtin_memcpy(sums + plan.unit * first,
                                  static_cast<const char*>(a.state[l]) + bytes * offset,
                                  size_t(bytes * m));
               });
  int flags = 0;
  if (plan.fused)
    add_fused(a, plan, begin, end, sums);
  else
    flags = add_decoded(a, plan, wide, begin, end, sums);
  for_pieces(a.starts, a.layers, begin, end,
             [&](int64_t l, int64_t offset, int64_t first, int64_t m) {
               char* at = sums + plan.unit * first;
               if (plan.bins) join_bins(reinterpret_cast<double*>(at), m);
               const bool doubles = plan.bins || wide(l);
               for (int64_t i = 0; i < m; i += BLOCK_MAX) {
                 const int64_t count = m - i < BLOCK_MAX ? m - i : BLOCK_MAX;
                 if (doubles)
                   flags |= finish(l, offset + i, count, reinterpret_cast<double*>(at) + i);
                 else
                   flags |= finish(l, offset + i, count, reinterpret_cast<float*>(at) + i);
               }
             });
  return flags;
}

template <class Wide, class Finish>
static int sum_packets(const CombineArgs& a, const Wide& wide, const Finish& finish) {
  const SumPlan plan = plan_sums(a, wide);
  const int64_t total = a.starts[a.layers], blocks = (total + plan.size - 1) / plan.size;
  int flags = 0;
  for_ranges(blocks, a.threads, [&](int64_t thread, int64_t first, int64_t last) {
    char* sums = static_cast<char*>(a.scratch) + thread * sum_bytes(plan);
    int found = 0;
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * plan.size, rest = total - begin;
      found |= sum_block(a, plan, wide, begin, rest < plan.size ? total : begin + plan.size, sums,
                         finish);
    }
    if (found) __atomic_fetch_or(&flags, found, __ATOMIC_RELAXED);
  });
  return flags;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
