// Weighted sums of packets, a block of coordinates at a time: each packet in turn is decoded into
// the first-level cache and added, beginning with +0, so that a sum has the order and the bits of
// the sum of decoded rows (cpu/sums.h), except that it is never -0. The sums of a block are handed
// on layer by layer and never go to memory.
#pragma once

#include "api.h"
#include "cpu/chunks.h"
#include "cpu/packets.h"
#include "cpu/sums.h"

namespace flcore {
namespace FLCORE_ISA {

// Working memory of a block, on the stack of its thread. Sums of coordinate i of the block are at
// sums + 8 i, in float32 or float64; those in bins at b * TILE_BINS + i of doubles.
struct PacketBlock {
  alignas(64) char sums[8 * BLOCK_MAX];
  alignas(64) float row[BLOCK_MAX];
  alignas(64) float work[DECODE_WORK];
};
static_assert(3 * TILE_BINS <= BLOCK_MAX, "the bins of a block have room");

// Adds one decoded packet to the sums of a block; returns CombineFlags.
template <class Wide>
static int add_packet(const CombineArgs& a, const Wide& wide, int64_t i, int64_t begin, int64_t end,
                      PacketBlock& block) {
  bool range = false;
  decode_rows(a.packets + i, 1, begin, end - begin, block.row, 0, block.work);
  for_pieces(a.starts, a.layers, begin, end, [&](int64_t l, int64_t, int64_t first, int64_t m) {
    const void* x = block.row;
    const double w = a.by_layer ? a.weights[i * a.layers + l] : a.weights[i];
    const Rows one{&x, 1, nullptr, &w, 1, 1};
    char* at = block.sums + 8 * first;
    if (a.accumulate == ACC_REPRODUCIBLE)
      range |=
          add_row_bins<F32>(block.row + first, w, 0, nullptr, reinterpret_cast<double*>(at), m);
    else if (wide(l))
      add_rows<F32>(one, first, reinterpret_cast<double*>(at), m, false);
    else
      add_rows<F32>(one, first, reinterpret_cast<float*>(at), m, false);
  });
  return range ? COMBINE_OUT_OF_RANGE : 0;
}

// finish(layer, offset, count, sums) for every layer's part of every block, sums float or double as
// wide(layer) says; returns what add_packet and finish found.
template <class Wide, class Finish>
static int sum_packets(const CombineArgs& a, const Wide& wide, const Finish& finish) {
  const bool bins = a.accumulate == ACC_REPRODUCIBLE;
  const int64_t size = bins ? TILE_BINS : BLOCK_MAX, total = a.starts[a.layers];
  int flags = 0;
  for_chunks((total + size - 1) / size, a.threads, [&](int64_t number) {
    const int64_t begin = number * size, end = begin + size < total ? begin + size : total;
    PacketBlock block;
    int found = 0;
    __builtin_memset(block.sums, 0, sizeof(block.sums));
    for (int64_t i = 0; i < a.n; ++i) found |= add_packet(a, wide, i, begin, end, block);
    for_pieces(a.starts, a.layers, begin, end,
               [&](int64_t l, int64_t offset, int64_t first, int64_t m) {
                 double* sums = reinterpret_cast<double*>(block.sums + 8 * first);
                 if (bins) join_bins(sums, m);
                 if (bins || wide(l))
                   found |= finish(l, offset, m, sums);
                 else
                   found |= finish(l, offset, m, reinterpret_cast<float*>(sums));
               });
    if (found) __atomic_fetch_or(&flags, found, __ATOMIC_RELAXED);
  });
  return flags;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
