// Memory probes for the roofline of the benchmarks: what a plain read and a plain copy reach here.
//   read: one pass over `bytes`, summed as 64-bit words so that nothing can be left out
//   copy: reads `bytes`, writes `bytes`
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t BLOCK = 1 << 16;

static uint64_t read(const void* src, int64_t bytes, int threads) {
  uint64_t total = 0;
  for_chunks((bytes + BLOCK - 1) / BLOCK, threads, [&](int64_t b) {
    const char* p = static_cast<const char*>(src) + b * BLOCK;
    const int64_t m = bytes - b * BLOCK < BLOCK ? bytes - b * BLOCK : BLOCK;
    vi64 sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * VEC_BYTES <= m; i += 4 * VEC_BYTES)
      for (int k = 0; k < 4; ++k) sum[k] += load<vi64>(p + i + k * VEC_BYTES);
    uint64_t s = 0;
    for (; i < m; ++i) s += uint64_t(static_cast<unsigned char>(p[i]));
    for (int k = 0; k < 4; ++k)
      for (int j = 0; j < LANES64; ++j) s += uint64_t(sum[k][j]);
    __atomic_fetch_add(&total, s, __ATOMIC_RELAXED);
  });
  return total;
}

static void copy(void* dst, const void* src, int64_t bytes, int threads) {
  for_chunks((bytes + BLOCK - 1) / BLOCK, threads, [&](int64_t b) {
    const int64_t m = bytes - b * BLOCK < BLOCK ? bytes - b * BLOCK : BLOCK;
    __builtin_memcpy(static_cast<char*>(dst) + b * BLOCK, static_cast<const char*>(src) + b * BLOCK,
                     size_t(m));
  });
}

}  // namespace FLCORE_ISA

extern const ProbeFns FLCORE_TABLE(probe);
const ProbeFns FLCORE_TABLE(probe) = {&FLCORE_ISA::read, &FLCORE_ISA::copy};

}  // namespace flcore
