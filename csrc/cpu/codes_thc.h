// THC codes, which a server adds as integers: the same signs, the same norms and the same grid for
// all clients, one code out of a table T a coordinate, rounded stochastically.
//   p = (z m^1/2 / l) g / (2 t) + g / 2, cut to 0 .. g        z = m^-1/2 Had(S x), T from 0 to g
//   code j or j + 1 where T_j <= p < T_{j+1}, at random so that the mean of T is p
//   D = S Had(2 T - g) t l / (g m)        one norm for all: l (d / m)^-1/2 takes the place of l
// 2 T - g and its transform are integers below 2^24, hence exact: only the factor and the product
// round, and the mean of several D is one transform of the sum of their T (lut_add.isa.cpp).
//
// Li et al., "THC: Accelerating Distributed Deep Learning Using Tensor Homomorphic Compression",
// NSDI 2024, arXiv 2302.08545.
#pragma once

#include <cstdint>

#include "cpu/codes_rotated.h"
#include "cpu/thc_grid.h"

namespace flcore {
namespace FLCORE_ISA {

struct ThcTable {
  float low[16], high[16];  // T_j and T_{j + 1}
  float bound[16];          // T_1 .. T_{last - 1}, then infinity
  int g;

  FLCORE_MEMBER ThcTable(const uint16_t* table, int bits) : g(table[(1 << bits) - 1]) {
    const int last = (1 << bits) - 1;
    for (int k = 0; k < 16; ++k) {
      low[k] = float(table[k < last ? k : last]);
      high[k] = float(table[k < last ? k + 1 : last]);
      bound[k] = k + 1 < last ? float(table[k + 1]) : __builtin_inff();
    }
  }
};

// Codes of the transformed block; z <- 2 T - g.
template <int BITS>
static void thc_codes(float* z, int64_t m, const ThcTable& t, float up, const uint16_t* random,
                      uint8_t* codes) {
  constexpr int LAST = (1 << BITS) - 1;
  const float g = float(t.g), half = 0.5f * g;
  int64_t i = 0;
  for (; i + LANES <= m; i += LANES) {
    vf32 p = load<vf32>(z + i) * up + half;
    p = p > 0.0f ? p : vf32{};
    p = p < g ? p : vf32{} + g;
    vi32 code = {};
#pragma GCC unroll 16
    for (int k = 0; k + 1 < LAST; ++k) code -= p >= t.bound[k];
    const vf32 low = look_up(t.low, code), high = look_up(t.high, code);
    const vi32 more = random_fraction(random, i, vf32{}) * (high - low) < p - low;
    const vf32 value = more ? high : low;
    store(z + i, (value + value) - g);
    store_u8(codes + i, code - more);
  }
  for (; i < m; ++i) {
    float p = z[i] * up + half;
    p = p > 0.0f ? p : 0.0f;
    p = p < g ? p : g;
    int code = 0;
    for (int k = 0; k + 1 < LAST; ++k) code += p >= t.bound[k];
    const float low = t.low[code], high = t.high[code];
    const bool more = random_fraction(random, i, 0.0f) * (high - low) < p - low;
    const float value = more ? high : low;
    z[i] = (value + value) - g;
    codes[i] = uint8_t(code + more);
  }
}

// Random bits of coordinates [first, first + m), those that fill the last block up included.
static void thc_random(const PhiloxStream& s, int64_t first, int64_t m, uint16_t* out) {
  uint32_t words[HADAMARD_MAX / 2];  // first is even, and m too unless it is 1
  philox_fill<PhiloxRaw>(s, first >> 1, (m + 1) >> 1, words);
  __builtin_memcpy(out, words, size_t(2 * m));
}

template <int BITS>
static void quantize_thc(const BucketJob& job, const ThcArgs& x, int64_t m) {
  const float norm = x.norms[x.shared ? 0 : job.index];
  if (!(norm > 0)) {
    __builtin_memset(job.codes, 0, size_t((m * BITS + 7) / 8));
    __builtin_memset(job.d, 0, size_t(job.n) * 4);
    return;
  }
  float* z = job.work;
  uint8_t* codes = reinterpret_cast<uint8_t*>(z + m);
  uint16_t random[HADAMARD_MAX];
  thc_random(job.c.rounding, job.first, m, random);
  HadamardSigns signs;
  signs.make(job.c.rotation, job.first, m);
  const ThcTable table(x.table, BITS);
  const uint32_t power = rotation_power(job.u, job.n);
  rotation_forward(job.u, job.n, m, signs, power, z);
  const int64_t total = x.shared ? x.numel : m;
  thc_codes<BITS>(z, m, table, thc_up(norm, x.clip, table.g, m, total, power), random, codes);
  pack_codes<BITS>(codes, m, job.codes);
  hadamard(z, m);
  rotation_backward(z, job.n, signs, float(thc_down(norm, x.clip, table.g, m, total)), job.d);
}

[[maybe_unused]] static void quantize_thc(const BucketJob& job) {
  const ThcArgs& x = *static_cast<const ThcArgs*>(job.c.extra);
  const int64_t m = hadamard_size(job.n);
  if (job.c.bits == 2)
    quantize_thc<2>(job, x, m);
  else
    quantize_thc<4>(job, x, m);
}

// A whole block; out may have any alignment. work: 2 * BLOCK_MAX floats. The norm section holds the
// clip t, then the norms.
[[maybe_unused]] static void dequantize_thc(const PacketView& p, const Segment& s, float* out,
                                            float* work) {
  const bool shared = p.form == 1;
  const int64_t m = hadamard_size(s.n);
  const float norm = load<float>(p.norm + 4 + (shared ? 0 : 4 * s.bucket));
  if (norm == 0) {
    __builtin_memset(out, 0, size_t(s.n) * 4);
    return;
  }
  const int last = (1 << p.bits) - 1, g = load<uint16_t>(p.codebook + 2 * last);
  float table[16] = {};
  for (int k = 0; k <= last; ++k) table[k] = float(2 * load<uint16_t>(p.codebook + 2 * k) - g);
  uint8_t* codes = reinterpret_cast<uint8_t*>(work + m);
  if (p.bits == 2)
    rotation_values<2>(s.codes(p), m, table, work, codes);
  else
    rotation_values<4>(s.codes(p), m, table, work, codes);
  hadamard(work, m);
  HadamardSigns signs;
  signs.make(philox_stream(p.seed, uint32_t(p.round), STREAM_ROTATION, 0), s.bucket * p.bucket, m);
  const double down = thc_down(norm, load<float>(p.norm), g, m, shared ? p.numel : m);
  rotation_backward(work, s.n, signs, float(down), out);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
