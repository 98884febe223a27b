// Stretches of Philox4x32-10 streams on the GPU (layout and arithmetic in philox.h):
//   bits:    out[j] = element offset + j of the stream, uint32
//   uniform: out[j] = (bits >> 8) 2^-24, float32 in [0, 1)
//   normal:  out[j], out[j + 1] = Box-Muller of their two words, float32 (box_muller.h)
// Writes 4 bytes a value, reads nothing; one thread makes the four values of a Philox block.
// Integer arithmetic, and float32 operations rounded one by one: the bits of every other variant.
#include "common.cuh"
#include "launch.h"
#include "normal.cuh"

namespace flcore {
namespace cuda {

constexpr int THREADS = 256;
constexpr int BLOCKS_PER_SM = 8;  // 2,048 threads: all a multiprocessor holds

// ---- kernels -----------------------------------------------------------------------------------

// `aligned`: the addresses of whole blocks are multiples of 16 bytes
template <int FORM>
__global__ void __launch_bounds__(THREADS)
    random_kernel(PhiloxStream stream, int64_t offset, int64_t numel, bool aligned, uint32_t* out) {
  const int64_t first = offset >> 2, blocks = ((offset + numel + 3) >> 2) - first;
  const int64_t stride = int64_t(gridDim.x) * THREADS;
  for (int64_t b = int64_t(blockIdx.x) * THREADS + threadIdx.x; b < blocks; b += stride) {
    PhiloxBlock block = philox_block(stream, uint32_t(first + b));
    if constexpr (FORM == RANDOM_UNIFORM)
      for (int k = 0; k < 4; ++k) block.w[k] = __float_as_uint(philox_uniform(block.w[k]));
    if constexpr (FORM == RANDOM_NORMAL)
      for (int k = 0; k < 4; k += 2) {
        const float2 z = normal_pair(block.w[k], block.w[k + 1]);
        block.w[k] = __float_as_uint(z.x);
        block.w[k + 1] = __float_as_uint(z.y);
      }
    const int64_t j = 4 * (first + b) - offset;
    if (aligned && j >= 0 && j + 4 <= numel) {
      store<4>(out + j, block.w);
      continue;
    }
    for (int k = 0; k < 4; ++k)
      if (j + k >= 0 && j + k < numel) out[j + k] = block.w[k];
  }
}

// ---- launchers ---------------------------------------------------------------------------------

void launch_random(const RngArgs& a, int form, int device, uintptr_t stream) {
  if (a.numel == 0) return;
  const DeviceGuard guard(device);
  const int64_t blocks = ((a.offset + a.numel + 3) >> 2) - (a.offset >> 2);
  const int64_t wanted = (blocks + THREADS - 1) / THREADS;
  const int64_t resident = int64_t(multiprocessors(device)) * BLOCKS_PER_SM;
  const unsigned grid = unsigned(wanted < resident ? wanted : resident);
  const bool aligned = (reinterpret_cast<uintptr_t>(a.out) - 4 * uintptr_t(a.offset)) % 16 == 0;
  auto* kernel = form == RANDOM_BITS      ? &random_kernel<RANDOM_BITS>
                 : form == RANDOM_UNIFORM ? &random_kernel<RANDOM_UNIFORM>
                                          : &random_kernel<RANDOM_NORMAL>;
  kernel<<<grid, THREADS, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      a.stream, a.offset, a.numel, aligned, static_cast<uint32_t*>(a.out));
  check_launch("random_kernel");
}

}  // namespace cuda
}  // namespace flcore
