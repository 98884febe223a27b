// Codes of a weight, one a byte, to and from the layouts "rows" and "tile16" (csrc/api.h, QWeight).
// Sixteen rows of codes lie `stride` bytes apart in a buffer; both layouts read and write it, so
// that a change of layout is the one after the other. A permutation: exact.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/codes_pack.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t BLOCK_ROWS = 16, CHUNK_K = 32;

inline int64_t chunks_of(int64_t k) { return (k + CHUNK_K - 1) / CHUNK_K; }

// Bytes from row to row of a buffer: an odd number of cache lines, so that 16 rows that are walked
// together do not meet in the same few sets of the first-level cache.
inline int64_t code_stride(int64_t k) {
  const int64_t lines = (chunks_of(k) * CHUNK_K + 63) / 64 + 1;
  return 64 * (lines | 1);
}

inline int64_t row_bytes(int64_t k, int bits) {
  return bits == 3 ? (k + 3) / 4 + (k + 7) / 8 : (k * bits + 7) / 8;
}

// ---- rows ------------------------------------------------------------------------------------

// `plane`: k bytes to work in
void pack_row(int bits, const uint8_t* q, int64_t k, uint8_t* out, uint8_t* plane) {
  if (bits != 3) return pack_codes(bits, q, k, out);
  for (int64_t i = 0; i < k; ++i) plane[i] = q[i] & 3;
  pack_codes<2>(plane, k, out);
  for (int64_t i = 0; i < k; ++i) plane[i] = q[i] >> 2;
  pack_codes<1>(plane, k, out + (k + 3) / 4);
}

void unpack_row(int bits, const uint8_t* in, int64_t k, uint8_t* q, uint8_t* plane) {
  if (bits != 3) return unpack_codes(bits, in, k, q);
  unpack_codes<2>(in, k, q);
  unpack_codes<1>(in + (k + 3) / 4, k, plane);
  for (int64_t i = 0; i < k; ++i) q[i] |= uint8_t(plane[i] << 2);
}

// ---- tile16: four codes of a row are a dword -------------------------------------------------

constexpr uint32_t each(int bits) { return 0x01010101u * ((1u << bits) - 1); }

// One vector of 64 bytes from FIELDS * 4 codes of each of 16 rows; FROM: lowest bit of a code taken
template <int BITS, int FROM>
FLCORE_INLINE void tile_vector(const uint8_t* q, int64_t stride, uint8_t* out) {
  constexpr int FIELDS = 8 / BITS;
  for (int r = 0; r < BLOCK_ROWS; ++r) {
    uint32_t x = 0;
    for (int t = 0; t < FIELDS; ++t)
      x |= ((load<uint32_t>(q + r * stride + 4 * t) >> FROM) & each(BITS)) << (BITS * t);
    store(out + 4 * r, x);
  }
}

template <int BITS, int FROM>
FLCORE_INLINE void untile_vector(const uint8_t* in, int64_t stride, uint8_t* q) {
  constexpr int FIELDS = 8 / BITS;
  for (int r = 0; r < BLOCK_ROWS; ++r) {
    const uint32_t x = load<uint32_t>(in + 4 * r);
    for (int t = 0; t < FIELDS; ++t) {
      uint32_t v = ((x >> (BITS * t)) & each(BITS)) << FROM;
      if constexpr (FROM) v |= load<uint32_t>(q + r * stride + 4 * t);
      store(q + r * stride + 4 * t, v);
    }
  }
}

// A byte of each of 8 codes is a whole dword: a copy
template <bool PACK>
FLCORE_INLINE void copy_vector(uint8_t* q, int64_t stride, uint8_t* tile) {
  for (int r = 0; r < BLOCK_ROWS; ++r) {
    if constexpr (PACK)
      store(tile + 4 * r, load<uint32_t>(q + r * stride));
    else
      store(q + r * stride, load<uint32_t>(tile + 4 * r));
  }
}

void pack_tiles(int bits, const uint8_t* q, int64_t stride, int64_t k, uint8_t* out) {
  for (int64_t c = 0; c < chunks_of(k); ++c, q += CHUNK_K, out += 64 * bits) {
    if (bits == 8) {
      for (int v = 0; v < 8; ++v)
        copy_vector<true>(const_cast<uint8_t*>(q) + 4 * v, stride, out + 64 * v);
    } else if (bits == 4) {
      for (int v = 0; v < 4; ++v) tile_vector<4, 0>(q + 8 * v, stride, out + 64 * v);
    } else {
      for (int v = 0; v < 2; ++v) tile_vector<2, 0>(q + 16 * v, stride, out + 64 * v);
      if (bits == 3) tile_vector<1, 2>(q, stride, out + 128);
    }
  }
}

void unpack_tiles(int bits, const uint8_t* in, int64_t stride, int64_t k, uint8_t* q) {
  for (int64_t c = 0; c < chunks_of(k); ++c, q += CHUNK_K, in += 64 * bits) {
    if (bits == 8) {
      for (int v = 0; v < 8; ++v)
        copy_vector<false>(q + 4 * v, stride, const_cast<uint8_t*>(in) + 64 * v);
    } else if (bits == 4) {
      for (int v = 0; v < 4; ++v) untile_vector<4, 0>(in + 64 * v, stride, q + 8 * v);
    } else {
      for (int v = 0; v < 2; ++v) untile_vector<2, 0>(in + 64 * v, stride, q + 16 * v);
      if (bits == 3) untile_vector<1, 2>(in + 128, stride, q);
    }
  }
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
