// Packets in the place of rows, for kernels that work on tiles: a block of coordinates of all
// packets is decoded into cache, and the rows of the block are what the kernel reads. Blocks are
// cut by coordinates of the whole update, not by layer, so that small layers share one decoding.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/layers.h"

namespace flcore {

extern const DecodeFns FLCORE_TABLE(decode);

namespace FLCORE_ISA {

// Coordinates begin .. begin + count - 1 of packets as rows of `out`, stride floats apart.
FLCORE_INLINE void decode_rows(const PacketView* packets, int64_t n, int64_t begin, int64_t count,
                               float* out, int64_t stride, float* work) {
  FLCORE_TABLE(decode).rows(packets, n, begin, count, out, stride, work);
}

// Longest bucket of those that can only be decoded as a whole; blocks shorter than that decode it
// more than once.
static inline int64_t whole_bucket(const PacketView* packets, int64_t n) {
  int64_t longest = 1;
  for (int64_t i = 0; i < n; ++i) {
    const bool whole = packets[i].codec == CODEC_ROTATED || packets[i].codec == CODEC_THC;
    if (whole && packets[i].bucket > longest) longest = packets[i].bucket;
  }
  return longest < BLOCK_MAX ? longest : BLOCK_MAX;
}

// Floats from row to row of a block: rows a power of two apart would share few sets of the cache.
static inline int64_t row_stride(int64_t count) { return (count + 15) / 16 * 16 + 16; }

// Calls body(layer, offset in the layer, offset in the block, count) for each part of a block that
// lies in one layer.
template <class Body>
FLCORE_INLINE void for_pieces(const int64_t* starts, int64_t layers, int64_t begin, int64_t end,
                              const Body& body) {
  if (begin == end) return;
  int64_t at = begin;
  for (int64_t l = find_layer(starts, layers, begin); at < end; ++l) {
    const int64_t stop = starts[l + 1] < end ? starts[l + 1] : end;
    if (stop > at) body(l, at - starts[l], at - begin, stop - at);
    if (stop > at) at = stop;
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
