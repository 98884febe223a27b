// What codecs do where a vector ends, and codes of 9 bits to and from the wire.
#pragma once

#include <cstdint>

#include "cpu/int_lanes.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// A few bytes, where a vector ends: a loop that does not become a call.
FLCORE_INLINE void copy_some(void* to, const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i)
    static_cast<uint8_t*>(to)[i] = static_cast<const uint8_t*>(from)[i];
}

// Random bits from the i-th on; there may be none.
FLCORE_INLINE const uint16_t* ahead(const uint16_t* random, int64_t i) {
  return random ? random + i : random;
}

// ---- 9 bits: code j of a bucket occupies the bits [9 j, 9 j + 9), the rest is zero -------------

FLCORE_INLINE uint64_t join_nine(uint64_t v) {  // four codes, one a word, to 36 bits
  v = (v & 0x000001ff000001ff) | ((v & 0x01ff000001ff0000) >> 7);
  return (v & 0x3ffff) | (v >> 32 << 18);
}
FLCORE_INLINE uint64_t split_nine(uint64_t v) {
  v = (v & 0x3ffff) | ((v >> 18 & 0x3ffff) << 32);
  return (v & 0x000001ff000001ff) | ((v & 0x0003fe000003fe00) << 7);
}

FLCORE_INLINE void pack_eight_nines(const uint16_t* codes, uint8_t* out) {
  const uint64_t low = join_nine(load<uint64_t>(codes));
  const uint64_t high = join_nine(load<uint64_t>(codes + 4));
  store(out, low | high << 36);
  out[8] = uint8_t(high >> 28);
}
FLCORE_INLINE void unpack_eight_nines(const uint8_t* in, uint16_t* codes) {
  const uint64_t v = load<uint64_t>(in);
  store(codes, split_nine(v));
  store(codes + 4, split_nine(v >> 36 | uint64_t(in[8]) << 28));
}

// n codes, one a word and below 2^9, into ceil(9 n / 8) bytes
static void pack_nines(const uint16_t* codes, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8, out += 9) pack_eight_nines(codes + i, out);
  if (i == n) return;
  uint16_t last[8] = {};
  uint8_t packed[9];
  copy_some(last, codes + i, 2 * (n - i));
  pack_eight_nines(last, packed);
  copy_some(out, packed, (9 * (n - i) + 7) / 8);
}

static void unpack_nines(const uint8_t* in, int64_t n, uint16_t* codes) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8, in += 9) unpack_eight_nines(in, codes + i);
  if (i == n) return;
  uint16_t last[8];
  uint8_t packed[9] = {};
  copy_some(packed, in, (9 * (n - i) + 7) / 8);
  unpack_eight_nines(packed, last);
  copy_some(codes + i, last, 2 * (n - i));
}

}  // namespace FLCORE_ISA
}  // namespace flcore
