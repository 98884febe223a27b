// What codecs of buckets supply: how the coordinates of one bucket become codes, and back.
//   void quantize_X(const BucketJob& job);
//   void dequantize_X(const PacketView& p, const Segment& s, float* out, float* work);
// quantize.isa.cpp and decode.isa.cpp call them; codes_<family>.h has them.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// One bucket on its way into a packet. u is finite.
struct BucketJob {
  const CodecArgs& c;
  int64_t index;           // number of the bucket
  int64_t first;           // its first coordinate
  int64_t n;               // coordinates, at least 1
  const float* u;          // [n], not aligned: load<>
  const uint16_t* random;  // [n] random bits of stream `rounding` when stochastic, not aligned
  uint8_t* scales;         // of this bucket
  uint8_t* codes;          // of this bucket; every byte of them is written
  float* d;                // [n] decoded: what dequantize gives, bit for bit
  float* work;             // [2 * bucket + 64] scratch, 64-byte aligned
};

// Part of a bucket that is to be decoded. It starts at a multiple of 8 coordinates, hence at a byte;
// ROTATED and THC always get whole buckets. n <= BLOCK_MAX.
struct Segment {
  int64_t bucket;  // number of the bucket
  int64_t length;  // coordinates of the whole bucket
  int64_t begin;   // first coordinate that is wanted, counted in the bucket
  int64_t n;       // how many

  FLCORE_MEMBER const uint8_t* scales(const PacketView& p) const {
    return p.scales + bucket * p.scale_stride;
  }
  FLCORE_MEMBER const uint8_t* codes(const PacketView& p) const {  // of the whole bucket
    return p.codes + bucket * p.code_stride;
  }
};

// ---- rounding, for a vector or one value -------------------------------------------------------

// 16 random bits as r = (bits + 1/2) 2^-16, exact: the middle of one of 65,536 parts of [0, 1)
FLCORE_INLINE float random_fraction(const uint16_t* random, int64_t i, float) {
  return float_of(0x3f800040u | uint32_t(load<uint16_t>(random + i)) << 7) - 1.0f;
}
FLCORE_INLINE vf32 random_fraction(const uint16_t* random, int64_t i, const vf32&) {
  const vu32 high = (vu32)load_f32<BF16>(random, i);  // the bits, 16 places up
  return (vf32)((high >> 9) | 0x3f800040u) - 1.0f;
}

// |y| < 2^22 becomes an integer when 1.5 * 2^23 is added: half to even, as the adder rounds.
constexpr float ROUND_MAGIC = 12582912.0f;
constexpr int32_t ROUND_MAGIC_BITS = 0x4b400000;

FLCORE_INLINE int32_t float_bits(float x) { return int32_t(bits_of(x)); }
FLCORE_INLINE vi32 float_bits(const vf32& x) { return (vi32)x; }

// y to an integer: the nearest, or floor(y + r). `value` is that integer as a float.
template <bool STOCHASTIC, class V>
FLCORE_INLINE auto round_code(const V& y, const uint16_t* random, int64_t i, V& value) {
  if constexpr (STOCHASTIC) {
    const V z = y + random_fraction(random, i, V{});
    const V t = z + ROUND_MAGIC;
    const V near = t - ROUND_MAGIC;
    const auto over = near > z;  // -1 in lanes that were rounded up; 1 for a single value
    if constexpr (sizeof(V) == 4) {
      value = near - (over ? 1.0f : 0.0f);
      return float_bits(t) - ROUND_MAGIC_BITS - int32_t(over);
    } else {
      value = near - (over ? V{} + 1.0f : V{});
      return float_bits(t) - ROUND_MAGIC_BITS + (vi32)over;
    }
  } else {
    const V t = y + ROUND_MAGIC;
    value = t - ROUND_MAGIC;
    return float_bits(t) - ROUND_MAGIC_BITS;
  }
}

// ---- scales on the wire ------------------------------------------------------------------------

// The largest float32 of which `reach` times is not above WIRE_LARGEST.
FLCORE_INLINE float scale_limit(double reach) {
  const double most = WIRE_LARGEST / reach;
  float x = float(most);
  if (double(x) * reach > WIRE_LARGEST) x = float_of(bits_of(x) - 1);
  return x;
}

// x >= 0 as it will be read from the wire: at least 2^-126 unless 0, so that its inverse is finite;
// bfloat16 is rounded up, so that nothing is clipped; but never above the limit.
FLCORE_INLINE float scale_value(float x, float limit, int dtype) {
  if (x > 0 && x < 0x1p-126f) x = 0x1p-126f;
  if (x > limit) x = limit;
  if (dtype != BF16) return x;
  const uint32_t up = (bits_of(x) + 0xffffu) & 0xffff0000u;
  return float_of(up > bits_of(limit) ? up - 0x10000u : up);
}

FLCORE_INLINE void store_scale(uint8_t* scales, int64_t i, float x, int dtype) {
  if (dtype == BF16)
    store(scales + 2 * i, uint16_t(bits_of(x) >> 16));
  else
    store(scales + 4 * i, x);
}
FLCORE_INLINE float load_scale(const uint8_t* scales, int64_t i, int dtype) {
  return dtype == BF16 ? load1<BF16>(scales, i) : load1<F32>(scales, i);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
