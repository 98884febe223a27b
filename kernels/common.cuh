// What every CUDA kernel of flcore shares: storage types, 16-byte access, the check after a launch.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "api.h"

namespace flcore {
namespace cuda {

// ---- host side ---------------------------------------------------------------------------------

// Throws std::runtime_error naming the kernel when its launch was refused.
void check_launch(const char* kernel);

int multiprocessors(int device);
size_t shared_limit(int device);  // bytes of shared memory a block can have

// The device of this thread for one scope: a launch goes to the device its stream belongs to.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

// ---- storage types -----------------------------------------------------------------------------

// 16-bit values travel as their bits; arithmetic is float32 or float64.
template <int D>
struct Storage {
  typedef uint16_t type;
};
template <>
struct Storage<F64> {
  typedef double type;
};
template <>
struct Storage<F32> {
  typedef float type;
};
template <int D>
using Stored = typename Storage<D>::type;

template <int D, class Acc>
__device__ __forceinline__ Acc widen(Stored<D> x) {  // exact, except float64 to float32
  if constexpr (D == F16)
    return Acc(__half2float(__ushort_as_half(x)));
  else if constexpr (D == BF16)
    return Acc(__uint_as_float(uint32_t(x) << 16));
  else
    return Acc(x);
}

__device__ __forceinline__ uint16_t bf16_bits(float x) {  // round to nearest even
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);  // keep a NaN a NaN
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// float64 to float32 rounded to odd: a second rounding to 16 bits is then as good as one rounding
__device__ __forceinline__ float round_to_odd(double x) {
  const float f = __double2float_rz(x);
  return double(f) == x || x != x ? f : __uint_as_float(__float_as_uint(f) | 1u);
}

template <int D>
__device__ __forceinline__ Stored<D> narrow(float x) {  // one rounding, to nearest even
  if constexpr (D == F16)
    return __half_as_ushort(__float2half_rn(x));
  else if constexpr (D == BF16)
    return bf16_bits(x);
  else
    return Stored<D>(x);
}

template <int D>
__device__ __forceinline__ Stored<D> narrow(double x) {
  if constexpr (D == F64 || D == F32)
    return Stored<D>(x);
  else
    return narrow<D>(round_to_odd(x));
}

// ---- N neighbouring values between memory and registers ----------------------------------------

// 16 bytes at a time where N values fill them (src and dst are then 16-byte aligned), else singly.
// Inputs are read once: evict-first loads keep them from pushing other data out of L2.
template <int N, class T>
__device__ __forceinline__ void load_once(T (&dst)[N], const T* src) {
  if constexpr (N * sizeof(T) % 16 == 0) {
    uint4 words[N * sizeof(T) / 16];
#pragma unroll
    for (int k = 0; k < int(N * sizeof(T) / 16); ++k)
      words[k] = __ldcs(reinterpret_cast<const uint4*>(src) + k);
    memcpy(dst, words, sizeof words);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) dst[k] = __ldcs(src + k);
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T* dst, const T (&src)[N]) {
  if constexpr (N * sizeof(T) % 16 == 0) {
    uint4 words[N * sizeof(T) / 16];
    memcpy(words, src, sizeof words);
#pragma unroll
    for (int k = 0; k < int(N * sizeof(T) / 16); ++k) reinterpret_cast<uint4*>(dst)[k] = words[k];
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) dst[k] = src[k];
  }
}

}  // namespace cuda
}  // namespace flcore
