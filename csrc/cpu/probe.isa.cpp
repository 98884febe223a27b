// Probes for the roofline of the benchmarks: what plain loops reach here.
//   read: one pass over `bytes`, summed as 64-bit words so that nothing can be left out
//   copy: reads `bytes`, writes `bytes`
//   exchanges: minimum and maximum of two vectors in registers, the step of a sorting network
//   products: s += a * b on vectors in registers, the step of a weighted sum (two roundings)
//   differences: s += (a - b)^2 likewise, the step of a squared distance (fused, as in gram)
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/fma.h"
#include "cpu/isa.h"
#include "cpu/network.h"
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

// Each thread works in its registers alone: 16 of them are enough, and the chains of operations that
// wait for each other are short beside the number of independent ones.
constexpr int WIRES = 12, SUMS = 8;

static float lane_sum(const vf32& v) {
  float s = 0;
  for (int j = 0; j < LANES; ++j) s += v[j];
  return s;
}

static int64_t exchanges(int64_t rounds, int threads, float* sink) {
  for_chunks(threads, threads, [&](int64_t t) {
    vf32 v[WIRES];
    for (int i = 0; i < WIRES; ++i) v[i] = vf32{} + float(5 * i % WIRES + t);
    for (int64_t r = 0; r < rounds; ++r) {
      for (int i = 0; i + 1 < WIRES; i += 2) exchange(v[i], v[i + 1]);
      for (int i = 1; i + 1 < WIRES; i += 2) exchange(v[i], v[i + 1]);
    }
    sink[t] = lane_sum(v[0]) + lane_sum(v[WIRES - 1]);
  });
  return rounds * (WIRES - 1) * LANES * threads;
}

template <bool SQUARED_DIFFERENCE>
static int64_t products(int64_t rounds, int threads, float* sink) {
  constexpr int ROWS = 32;  // one operand comes from the first-level cache, as it does in a kernel
  for_chunks(threads, threads, [&](int64_t t) {
    vf32 x[ROWS], sum[SUMS] = {};
    for (int i = 0; i < ROWS; ++i) x[i] = vf32{} + float(i + t);
    for (int64_t r = 0; r < rounds; ++r) {
      const vf32 b = x[r % ROWS];
      for (int i = 0; i < SUMS; ++i) {
        const vf32 a = x[(r + i) % ROWS];
        if constexpr (SQUARED_DIFFERENCE)
          sum[i] = vfma(a - b, a - b, sum[i]);
        else
          sum[i] += a * b;
      }
    }
    sink[t] = 0;
    for (int i = 0; i < SUMS; ++i) sink[t] += lane_sum(sum[i]);
  });
  return rounds * SUMS * LANES * threads;
}

}  // namespace FLCORE_ISA

extern const ProbeFns FLCORE_TABLE(probe);
const ProbeFns FLCORE_TABLE(probe) = {&FLCORE_ISA::read, &FLCORE_ISA::copy,
                                      &FLCORE_ISA::exchanges, &FLCORE_ISA::products<false>,
                                      &FLCORE_ISA::products<true>};

}  // namespace flcore
