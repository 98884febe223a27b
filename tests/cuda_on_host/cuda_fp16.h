// Half precision for cuda_runtime.h beside this, by the conversions of the CPU kernels.
#pragma once

#define FLCORE_ISA on_host
#include "cpu/vec.h"
#undef FLCORE_ISA

typedef struct {
  uint16_t bits;
} __half;

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return flcore::on_host::f16_to_f32(x.bits); }
inline __half __float2half_rn(float x) { return {flcore::on_host::f32_to_f16(x)}; }
