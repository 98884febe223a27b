// What the codes of bucket codecs decode to, coordinate by coordinate: the values of csrc/cpu/
// decode_linear.h, codes_float.h and codes_minifloat.h, each operation rounded by itself.
// A reader is value(bucket, j): coordinate j of a bucket.
#pragma once

#include "common.cuh"

namespace flcore {
namespace cuda {

// Code j of a bucket: bits [j bits, j bits + bits) of its bytes, bits <= 9. No byte that holds no bit
// of the code is read.
__device__ __forceinline__ uint32_t packed_code(const uint8_t* codes, uint32_t j, int bits) {
  const uint32_t at = j * uint32_t(bits), shift = at & 7u;
  uint32_t word = __ldg(codes + (at >> 3));
  if (shift + uint32_t(bits) > 8) word |= uint32_t(__ldg(codes + (at >> 3) + 1)) << 8;
  return (word >> shift) & ((1u << bits) - 1);
}

template <int D>
__device__ __forceinline__ float stored_value(const uint8_t* values, int64_t i) {
  return widen<D, float>(__ldg(reinterpret_cast<const Stored<D>*>(values) + i));
}

// Scale i of a bucket.
__device__ __forceinline__ float scale_of(const PacketView& p, int64_t bucket, int i) {
  const uint8_t* scales = p.scales + bucket * p.scale_stride;
  if (p.value_dtype == BF16) return stored_value<BF16>(scales, i);
  if (p.value_dtype == F32) return stored_value<F32>(scales, i);
  const uint32_t exponent = __ldg(scales);  // WIRE_E8M0
  return __uint_as_float(exponent ? exponent << 23 : 0x400000u);
}

template <int D>
struct DenseValues {
  const PacketView& p;
  __device__ float operator()(int64_t bucket, uint32_t j) const {
    return stored_value<D>(p.codes + bucket * p.code_stride, j);
  }
};

struct SignValues {
  const PacketView& p;
  __device__ float operator()(int64_t bucket, uint32_t j) const {
    const uint32_t sign = packed_code(p.codes + bucket * p.code_stride, j, 1) << 31;
    return __uint_as_float(__float_as_uint(scale_of(p, bucket, 0)) ^ sign);
  }
};

struct SymmetricValues {  // uniform, and ternary with two bits a code
  const PacketView& p;
  float middle;
  __device__ float operator()(int64_t bucket, uint32_t j) const {
    const uint32_t code = packed_code(p.codes + bucket * p.code_stride, j, p.bits);
    return __fmul_rn(scale_of(p, bucket, 0), __fsub_rn(float(code), middle));
  }
};

struct TritValues {  // five a byte, the first the least significant
  const PacketView& p;
  __device__ float operator()(int64_t bucket, uint32_t j) const {
    uint32_t byte = __ldg(p.codes + bucket * p.code_stride + j / 5);
    for (uint32_t k = j % 5; k > 0; --k) byte /= 3;
    return __fmul_rn(scale_of(p, bucket, 0), __fsub_rn(float(byte % 3), 1.0f));
  }
};

struct AffineValues {
  const PacketView& p;
  __device__ float operator()(int64_t bucket, uint32_t j) const {
    const uint32_t code = packed_code(p.codes + bucket * p.code_stride, j, p.bits);
    return __fadd_rn(scale_of(p, bucket, 0), __fmul_rn(scale_of(p, bucket, 1), float(code)));
  }
};

template <int FORM>
struct NaturalValues {  // powers of two; form 1: 2^(code - 109)
  const PacketView& p;
  __device__ float operator()(int64_t bucket, uint32_t j) const {
    constexpr int BITS = FORM == 0 ? 9 : 8;
    const uint32_t code = packed_code(p.codes + bucket * p.code_stride, j, BITS);
    uint32_t exponent = code & ((1u << (BITS - 1)) - 1);
    if (FORM == 0)
      exponent = min(exponent, 254u);
    else if (exponent > 0)
      exponent += 18;
    return __uint_as_float(exponent << 23 | (code >> (BITS - 1)) << 31);
  }
};

// Numbers of sign, exponent and MANTISSA bits; codes above TOP are the largest number.
template <int BITS, int MANTISSA, int EMIN, uint32_t TOP>
struct MiniFloatValues {
  const PacketView& p;
  __device__ float operator()(int64_t bucket, uint32_t j) const {
    constexpr uint32_t LEAST = uint32_t(EMIN + 127) << 23;  // 2^EMIN
    const uint32_t code = packed_code(p.codes + bucket * p.code_stride, j, BITS);
    const uint32_t magnitude = min(code & ((1u << (BITS - 1)) - 1), TOP);
    uint32_t x = (magnitude << (23 - MANTISSA)) + LEAST - (1u << 23);
    float value;
    if (magnitude < (1u << MANTISSA))  // subnormal: 1.m 2^EMIN less 2^EMIN
      value = __fsub_rn(__uint_as_float(x + (1u << 23)), __uint_as_float(LEAST));
    else
      value = __uint_as_float(x);
    value = __uint_as_float(__float_as_uint(value) | (code >> (BITS - 1)) << 31);
    return __fmul_rn(value, scale_of(p, bucket, 0));
  }
};

struct Int8Values {  // 64ths
  const PacketView& p;
  __device__ float operator()(int64_t bucket, uint32_t j) const {
    const int code = int8_t(__ldg(p.codes + bucket * p.code_stride + j));
    return __fmul_rn(float(max(code, -127)) * 0x1p-6f, scale_of(p, bucket, 0));
  }
};

struct Nf4Values {
  const PacketView& p;
  __device__ float operator()(int64_t bucket, uint32_t j) const {
    constexpr float VALUES[8] = {0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
                                 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                                 0.7229568362236023f,  1.0f};
    constexpr float BELOW[8] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f};
    const uint32_t code = packed_code(p.codes + bucket * p.code_stride, j, 4);
    float value = 0.0f;
#pragma unroll
    for (uint32_t k = 0; k < 8; ++k) {  // constants in registers: a table would be local memory
      if (code == k) value = BELOW[k];
      if (code == k + 8) value = VALUES[k];
    }
    return __fmul_rn(value, scale_of(p, bucket, 0));
  }
};

// Calls f with the reader of a packet of buckets; false when there is none on the device.
template <class F>
__device__ __forceinline__ bool with_values(const PacketView& p, const F& f) {
  switch (p.codec) {
    case CODEC_DENSE:
      if (p.value_dtype == F32) f(DenseValues<F32>{p});
      if (p.value_dtype == F16) f(DenseValues<F16>{p});
      if (p.value_dtype == BF16) f(DenseValues<BF16>{p});
      return true;
    case CODEC_SIGN: f(SignValues{p}); return true;
    case CODEC_UNIFORM: f(SymmetricValues{p, float((1 << (p.bits - 1)) - 1)}); return true;
    case CODEC_AFFINE: f(AffineValues{p}); return true;
    case CODEC_TERNARY:
      if (p.form == 1)
        f(TritValues{p});
      else
        f(SymmetricValues{p, 1.0f});
      return true;
    case CODEC_NATURAL:
      if (p.form == 0)
        f(NaturalValues<0>{p});
      else
        f(NaturalValues<1>{p});
      return true;
    case CODEC_MINIFLOAT:
      switch (p.form) {
        case 1: f(MiniFloatValues<8, 3, -6, 0x7e>{p}); break;
        case 2: f(MiniFloatValues<8, 2, -14, 0x7b>{p}); break;
        case 3: f(MiniFloatValues<6, 2, -2, 0x1f>{p}); break;
        case 4: f(MiniFloatValues<6, 3, 0, 0x1f>{p}); break;
        case 5: f(MiniFloatValues<4, 1, 0, 0x07>{p}); break;
        case 6: f(Int8Values{p}); break;
        default: f(Nf4Values{p});
      }
      return true;
    default: return false;
  }
}

}  // namespace cuda
}  // namespace flcore
