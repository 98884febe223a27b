// A CUDA runtime for processors: enough of it to compile kernels/*.cu as C++ and run their threads
// one after another, so that indices, barriers and arithmetic are tested where there is no GPU.
// Threads of a block are fibers that give way at __syncthreads and where a warp exchanges values; their
// order can be reversed, which shows a barrier that is missing. What runs at the same time, caches and timing are not modelled.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

// ---- errors, devices ---------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct CUstream_st* cudaStream_t;

namespace on_host {
constexpr size_t SHARED_LIMIT = 232448, SHARED_BY_DEFAULT = 49152;  // bytes of a block, sm_90
inline cudaError_t last_error = cudaSuccess;
inline int multiprocessors = 1;
inline bool reversed = false;
inline size_t shared_limit = SHARED_LIMIT;  // of the device
inline size_t asked_for = 0;  // shared memory of the kernel that was named last
inline const void* asked_by = nullptr;
extern char* shared;  // of the running block, and 4096 bytes more
void run_block(const std::function<void()>& body);
void wait();
const uint64_t* exchange(uint64_t value);  // the values that the 32 threads of the warp gave
}  // namespace on_host

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = on_host::last_error;
  on_host::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "refused"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? on_host::multiprocessors
                                                  : int(on_host::shared_limit);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  on_host::asked_by = kernel;
  on_host::asked_for = size_t(bytes);
  return cudaSuccess;
}

// ---- launch ------------------------------------------------------------------------------------

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... a) {
  const size_t bytes = config->dynamicSmemBytes;
  const bool asked = on_host::asked_by == reinterpret_cast<const void*>(kernel) &&
                     on_host::asked_for >= bytes;
  if (bytes > on_host::shared_limit || (bytes > on_host::SHARED_BY_DEFAULT && !asked) ||
      config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024)
    return on_host::last_error = cudaErrorInvalidValue;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::tuple<P...> parameters(a...);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    std::memset(on_host::shared, 0xff, bytes + 4096);  // NaN: nobody may count on zeros
    on_host::run_block([&] { std::apply(kernel, parameters); });
    for (size_t i = bytes; i < bytes + 4096; ++i)
      if (on_host::shared[i] != char(0xff)) throw std::runtime_error("shared memory overrun");
  }
  return cudaSuccess;
}

inline void __syncthreads() { on_host::wait(); }

// ---- exchange within a warp, all 32 threads ----------------------------------------------------

inline unsigned __ballot_sync(unsigned, bool bit) {
  const uint64_t* bits = on_host::exchange(bit);
  unsigned word = 0;
  for (int lane = 0; lane < 32; ++lane) word |= unsigned(bits[lane]) << lane;
  return word;
}
inline unsigned __shfl_up_sync(unsigned, unsigned value, unsigned apart) {
  const unsigned lane = threadIdx.x % 32;
  return unsigned(on_host::exchange(value)[lane < apart ? lane : lane - apart]);
}
inline unsigned __shfl_xor_sync(unsigned, unsigned value, int other) {
  const unsigned lane = threadIdx.x % 32;
  return unsigned(on_host::exchange(value)[lane ^ unsigned(other)]);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// ---- memory ------------------------------------------------------------------------------------

template <class T>
T on_host_load(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) throw std::runtime_error("misaligned load");
  return *p;
}
template <class T>
T __ldcs(const T* p) { return on_host_load(p); }
template <class T>
T __ldg(const T* p) { return on_host_load(p); }
inline int atomicOr(int* p, int bits) {
  const int before = *p;
  *p |= bits;
  return before;
}
template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p += x;
  return before;
}
inline unsigned atomicMax(unsigned* p, unsigned x) {
  const unsigned before = *p;
  *p = max(*p, x);
  return before;
}

// ---- arithmetic: one rounding each (compile with -ffp-contract=off) ----------------------------

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  const uint64_t bytes = x | uint64_t(y) << 32;
  unsigned word = 0;
  for (int i = 0; i < 32; i += 8) word |= unsigned(bytes >> (8 * (select >> (i / 2) & 7)) & 255) << i;
  return word;
}
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float __double2float_rn(double x) { return float(x); }
inline float __double2float_rz(double x) {
  const float nearest = float(x);
  return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}
