// Sums over the threads of a block, in the order of the threads.
#pragma once

#include "common.cuh"

namespace flcore {
namespace cuda {

constexpr unsigned WHOLE_WARP = 0xffffffffu;

// The sum of x over the threads before this one; `total` becomes that of all threads. scratch: a word
// a warp of shared memory. Every thread of the block takes part.
template <int THREADS>
__device__ __forceinline__ uint32_t scan_block(uint32_t x, uint32_t* scratch, uint32_t& total) {
  constexpr int WARPS = THREADS / 32;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  uint32_t sum = x;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const uint32_t before = __shfl_up_sync(WHOLE_WARP, sum, apart);
    if (lane >= apart) sum += before;
  }
  __syncthreads();  // somebody may still read the last sums
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  uint32_t others = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) others += scratch[w];
    total += scratch[w];
  }
  return others + sum - x;
}

}  // namespace cuda
}  // namespace flcore
