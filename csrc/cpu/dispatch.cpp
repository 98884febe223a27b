// Picks one row of CPU kernels for this process. Compiled with baseline flags only, so that even
// the error message of a processor that is too old can be printed.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "api.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace flcore {

// One line a stem: its table of every level is declared here and put into the level's row.
#define FLCORE_STEMS(X, isa) \
  X(Combine, combine, isa) X(Probe, probe, isa) X(Sparsify, sparsify, isa) \
  X(Decode, decode, isa) X(Quantize, quantize, isa) X(Indices, indices, isa) X(Randk, randk, isa) \
  X(Crc32c, crc32c, isa) X(Rng, rng, isa) X(Moments, moments, isa) X(Mask, mask, isa) \
  X(Select, select, isa) X(Gram, gram, isa) X(LowRank, low_rank, isa) X(Sketch, sketch, isa) X(Vote, vote, isa) \
  X(LutAdd, lut_add, isa) X(RowLoss, rowloss, isa) X(PerpGrad, perp_grad, isa) \
  X(LocalStep, local_step, isa) \
  X(StableMax, stablemax, isa) X(QEmbedding, qembedding, isa) X(QMatmul, qmatmul, isa) \
  X(QMatmul, qmatmul_dx, isa) \
  X(WeightQuant, weight_quant, isa) X(QMatmulInt8, qmatmul_int8, isa) X(ActQuant, act_quant, isa)

#define FLCORE_DECLARE(Type, stem, isa) extern const Type##Fns stem##_##isa;
#define FLCORE_ADDRESS(Type, stem, isa) , &stem##_##isa
#define FLCORE_ROW(isa) {#isa FLCORE_STEMS(FLCORE_ADDRESS, isa)}

FLCORE_STEMS(FLCORE_DECLARE, base)
#if defined(FLCORE_HAS_avx2)
FLCORE_STEMS(FLCORE_DECLARE, avx2)
#endif
#if defined(FLCORE_HAS_avx512)
FLCORE_STEMS(FLCORE_DECLARE, avx512)
#endif
#if defined(FLCORE_HAS_avx512x)
FLCORE_STEMS(FLCORE_DECLARE, avx512x)
#endif

// Best first.
static const CpuTable rows[] = {
#if defined(FLCORE_HAS_avx512x)
    FLCORE_ROW(avx512x),
#endif
#if defined(FLCORE_HAS_avx512)
    FLCORE_ROW(avx512),
#endif
#if defined(FLCORE_HAS_avx2)
    FLCORE_ROW(avx2),
#endif
    FLCORE_ROW(base)};

#if defined(__x86_64__)
// What v3 asks for beyond the names that every compiler's __builtin_cpu_supports knows.
static bool f16c_lzcnt_movbe() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C) || !(c & bit_MOVBE)) return false;
  return __get_cpuid(0x80000001u, &a, &b, &c, &d) && (c & (1u << 5));  // LZCNT, also called ABM
}
#endif

// A level is usable only if the processor has every flag its files were compiled with.
static bool usable(const char* name) {
#if defined(__x86_64__)
#define HAS(feature) __builtin_cpu_supports(feature)
  __builtin_cpu_init();  // the probe includes xgetbv: the OS must save the wide registers too
  const bool v2 = HAS("ssse3") && HAS("sse4.1") && HAS("sse4.2") && HAS("popcnt");
  const bool v3 = v2 && HAS("avx2") && HAS("fma") && HAS("bmi") && HAS("bmi2") &&
                  f16c_lzcnt_movbe();
  const bool v4 = v3 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") &&
                  HAS("avx512vl");
  if (!std::strcmp(name, "base")) return v2;
  if (!std::strcmp(name, "avx2")) return v3;
  if (!std::strcmp(name, "avx512")) return v4;
  if (!std::strcmp(name, "avx512x")) return v4 && HAS("avx512vnni") && HAS("avx512bf16");
#undef HAS
#endif
  return !std::strcmp(name, "base");
}

const CpuTable* cpu_level(const char* name) {
  for (const CpuTable& row : rows)
    if (!std::strcmp(row.name, name)) return usable(name) ? &row : nullptr;
  return nullptr;
}

int cpu_levels(const char** names, bool* can_run, int capacity) {
  int count = 0;
  for (const CpuTable& row : rows) {
    if (count == capacity) break;
    names[count] = row.name;
    can_run[count++] = usable(row.name);
  }
  return count;
}

static const CpuTable* choose() {
  const char* want = std::getenv("FLCORE_ISA");
  if (want && *want) {
    if (const CpuTable* row = cpu_level(want)) return row;
    std::string known;
    for (const CpuTable& row : rows)
      if (usable(row.name)) known += std::string(known.empty() ? "" : ", ") + row.name;
    throw std::runtime_error(std::string("FLCORE_ISA=") + want +
                             ": no such level in this build, or this processor cannot run it; "
                             "usable here: " + known);
  }
  for (const CpuTable& row : rows)
    if (usable(row.name)) return &row;
  throw std::runtime_error("flcore needs an x86-64-v2 processor (SSE4.2, POPCNT)");
}

const CpuTable& cpu() {
  static const CpuTable* row = choose();
  return *row;
}

}  // namespace flcore
