// Standard normals of a Philox stream in registers, for kernels that make their noise where they use
// it: the transform of box_muller.h, bit for bit that of csrc/cpu/normal.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "box_muller.h"

namespace flcore {
namespace cuda {

// The intrinsics are never merged into fma, whatever the compiler was told.
__device__ __forceinline__ float normal_step(float x, float y, float c) {  // x y + c, two roundings
  return __fadd_rn(__fmul_rn(x, y), c);
}

// sqrt(-2 ln((word + 1) 2^-32))
__device__ __forceinline__ float normal_radius(uint32_t word) {
  const bool above = word >> 31;  // above 1/2 the distance to 1 is converted
  const uint32_t bits = __float_as_uint(__uint2float_rn(above ? ~word : word + 1u));
  const uint32_t shifted = bits + (0x3f800000u - 0x3f3504f3u);
  const uint32_t mantissa = (shifted & 0x7fffffu) + 0x3f3504f3u;
  const float f = above ? __fmul_rn(__uint_as_float(bits), -0x1p-32f)
                        : __fadd_rn(__uint_as_float(mantissa), -1.0f);
  const float e = above ? 0.0f : __int2float_rn(int(shifted >> 23) - (127 + 32));
  const float s = __fdiv_rn(f, __fadd_rn(f, 2.0f));
  const float z = __fmul_rn(s, s);
  float p = normal_step(z, ATANH_3, ATANH_2);
  p = normal_step(p, z, ATANH_1);
  p = normal_step(p, z, ATANH_0);
  const float half = __fadd_rn(s, __fmul_rn(s, __fmul_rn(z, p)));  // ln(1 + f) / 2
  const float low = __fadd_rn(__fmul_rn(half, 2.0f), __fmul_rn(e, LN2_LO));
  return __fsqrt_rn(__fmul_rn(__fadd_rn(__fmul_rn(e, LN2_HI), low), -2.0f));
}

// Elements 2k and 2k + 1 of a stream from its words 2k and 2k + 1.
__device__ __forceinline__ float2 normal_pair(uint32_t first, uint32_t second) {
  const float r = normal_radius(first);
  const uint32_t quarter = (second + (1u << 29)) >> 30;
  const float x = __fmul_rn(__int2float_rn(int(second << 2) >> 9), 0x1p-23f);
  const float y = __fmul_rn(x, x);
  float s = normal_step(y, SIN_3, SIN_2);
  s = normal_step(s, y, SIN_1);
  s = normal_step(s, y, SIN_0);
  s = __fadd_rn(__fmul_rn(x, 1.5f), __fmul_rn(x, s));
  float c = normal_step(y, COS_4, COS_3);
  c = normal_step(c, y, COS_2);
  c = normal_step(c, y, COS_1);
  c = normal_step(c, y, 1.0f);
  const uint32_t cosine = __float_as_uint(quarter & 1u ? s : c) ^ (((quarter + 1u) & 2u) << 30);
  const uint32_t sine = __float_as_uint(quarter & 1u ? c : s) ^ ((quarter & 2u) << 30);
  return make_float2(__fmul_rn(r, __uint_as_float(cosine)), __fmul_rn(r, __uint_as_float(sine)));
}

}  // namespace cuda
}  // namespace flcore
