// Rotated codes (DRIVE with one bit, EDEN with more): a block is multiplied by random signs and the
// normalised Walsh-Hadamard matrix, after which every input looks normal, so that one fixed
// quantiser is near the best; one scale a block makes the code unbiased, or its error least.
//   z = m^-1/2 Had(S x)        c_j: nearest centroid q of z_j m^1/2 / ||x||
//   f = ||x||^2 / <q, z>  or  <q, z> / <q, q>,   at most ROTATION_LARGEST
//   D = S Had(q) (f m^-1/2)
// Code: bit b - 1 is the sign (1 = negative), the others count centroids from the smallest.
// A last block of n coordinates is filled with zeros to m = the next power of two.
//
// A block stays in L1: 2 log2 m additions a coordinate for the code and the residual, no memory but
// the update in and the code out. Float32, no fma; sums run in 16 lanes (place i in lane i % 16)
// that a fixed tree adds, so that every level has the same bits. The block is first scaled by a
// power of two, exactly, so that no norm can overflow or vanish.
//
// Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", NeurIPS 2021, arXiv 2105.08339;
// Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for
// Federated Learning", ICML 2022, arXiv 2108.08842; blocks instead of whole vectors: Suresh et al.,
// "Distributed Mean Estimation with Limited Communication", ICML 2017, arXiv 1611.00429.
#pragma once

#include <cstdint>

#include "cpu/codes.h"
#include "cpu/codes_bits.h"
#include "cpu/codes_pack.h"
#include "cpu/hadamard.h"
#include "cpu/int_lanes.h"
#include "cpu/vec.h"
#include "rotation.h"

namespace flcore {
namespace FLCORE_ISA {

// ---- encode ------------------------------------------------------------------------------------

// q of every code
template <int BITS>
FLCORE_INLINE void rotation_table(float (&table)[16]) {
  constexpr int HALF = 1 << (BITS - 1);
  for (int k = 0; k < 16; ++k) {
    const float q = ROTATION_CENTROID[BITS][k % HALF];
    table[k] = (k / HALF) & 1 ? -q : q;
  }
}

// The power of two that brings the largest magnitude of u near 1, as the bits of its exponent.
static uint32_t rotation_power(const float* u, int64_t n) {
  vi32 tops = {};
  int32_t top = 0;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vi32 key = load<vi32>(u + i) & 0x7fffffff;
    tops = key > tops ? key : tops;
  }
  for (; i < n; ++i) {
    const int32_t key = int32_t(bits_of(load<float>(u + i)) & 0x7fffffffu);
    top = key > top ? key : top;
  }
  for (int k = 0; k < LANES; ++k) top = tops[k] > top ? tops[k] : top;
  const uint32_t exponent = uint32_t(top) >> 23;
  const uint32_t power = exponent >= 254 ? 0 : 254 - exponent;
  return power < 1 ? 1 : power > 253 ? 253 : power;
}

// z <- the unnormalised transform of S u 2^(power - 127), filled with zeros to m; returns the
// squared norm of what went in.
static float rotation_forward(const float* u, int64_t n, int64_t m, const HadamardSigns& signs,
                              uint32_t power, float* z) {
  const float scale = float_of(power << 23);
  if (m >= HADAMARD_RUN && n == m) {
    LaneSums sums = {};
    for (int64_t i = 0; i < m; i += HADAMARD_RUN)
      hadamard_first(z + i, [&](auto k) FLCORE_LAMBDA {
        constexpr int K = decltype(k)::value;
        const vf32 x = scale * load<vf32>(u + i + LANES * K);
        sums.v[K % (16 / LANES)] += x * x;
        return signs.many(i + LANES * K, x);
      });
    hadamard_rest(z, m);
    return sums.total();
  }
  float sums[16] = {};
  for (int64_t i = 0; i < m; ++i) {
    const float x = i < n ? scale * load<float>(u + i) : 0.0f;
    sums[i & 15] += x * x;
    z[i] = signs.one(i, x);
  }
  hadamard(z, m);
  return LaneSums::tree(sums);
}

// out = S y times factor, n values
static void rotation_backward(const float* y, int64_t n, const HadamardSigns& signs, float factor,
                              float* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    store(out + i, signs.many(i, factor * load<vf32>(y + i)));
  for (; i < n; ++i) store(out + i, signs.one(i, factor * y[i]));
}

// Codes of the transformed block; z <- q. Returns sum |q| |z| and, in `squares`, sum q q.
template <int BITS>
static float rotation_codes(float* z, int64_t m, float inverse, uint8_t* codes, float& squares) {
  constexpr int HALF = 1 << (BITS - 1);
  float table[16];
  rotation_table<BITS>(table);
  if (m >= 16) {
    LaneSums dots = {}, norms = {};
    for (int64_t i = 0; i < m; i += 16)
#pragma GCC unroll 4
      for (int part = 0; part < 16 / LANES; ++part) {
        float* at = z + i + part * LANES;
        const vf32 x = load<vf32>(at);
        const vf32 size = (vf32)((vi32)x & 0x7fffffff);
        const vf32 y = size * inverse;
        vi32 code = {};
#pragma GCC unroll 8
        for (int k = 0; k + 1 < HALF; ++k) code -= y >= rotation_bound(BITS, k);
        const vf32 q = look_up(table, code);
        const vi32 negative = x < 0;
        dots.v[part] += q * size;
        norms.v[part] += q * q;
        store(at, (vf32)((vi32)q ^ (negative & int32_t(0x80000000u))));
        store_u8(codes + i + part * LANES, code | (negative & HALF));
      }
    squares = norms.total();
    return dots.total();
  }
  float dots[16] = {}, norms[16] = {};
  for (int64_t i = 0; i < m; ++i) {
    const float x = z[i], size = x < 0 ? -x : x, y = size * inverse;
    int code = 0;
    for (int k = 0; k + 1 < HALF; ++k) code += y >= rotation_bound(BITS, k);
    const float q = table[code];
    dots[i] += q * size;
    norms[i] += q * q;
    z[i] = x < 0 ? -q : q;
    codes[i] = uint8_t(code | (x < 0 ? HALF : 0));
  }
  squares = LaneSums::tree(norms);
  return LaneSums::tree(dots);
}

template <int BITS>
static void quantize_rotated(const BucketJob& job, int64_t m) {
  float* z = job.work;
  uint8_t* codes = reinterpret_cast<uint8_t*>(z + m);
  HadamardSigns signs;
  signs.make(job.c.rotation, job.first, m);
  const uint32_t power = rotation_power(job.u, job.n);
  const float norm = rotation_forward(job.u, job.n, m, signs, power, z);
  float scale = 0;
  if (norm > 0) {
    const float root = vsqrt(vf32{} + norm)[0], c = hadamard_norm(m);
    float squares;
    const float dot = c * rotation_codes<BITS>(z, m, 1.0f / root, codes, squares);
    const float f = (job.c.measure ? dot / squares : norm / dot) * float_of((254 - power) << 23);
    scale = f < ROTATION_LARGEST ? f : ROTATION_LARGEST;
    pack_codes<BITS>(codes, m, job.codes);
    hadamard(z, m);
    rotation_backward(z, job.n, signs, scale * c, job.d);
  } else {
    __builtin_memset(job.codes, 0, size_t((m * BITS + 7) / 8));
    __builtin_memset(job.d, 0, size_t(job.n) * 4);
  }
  store(job.scales, scale);
}

[[maybe_unused]] static void quantize_rotated(const BucketJob& job) {
  const int64_t m = hadamard_size(job.n);
  switch (job.c.bits) {
    case 1: quantize_rotated<1>(job, m); break;
    case 2: quantize_rotated<2>(job, m); break;
    case 3: quantize_rotated<3>(job, m); break;
    default: quantize_rotated<4>(job, m); break;
  }
}

// ---- decode ------------------------------------------------------------------------------------

template <int BITS>
static void rotation_values(const uint8_t* packed, int64_t m, const float (&table)[16], float* y,
                            uint8_t* codes) {
  unpack_codes<BITS>(packed, m, codes);
  int64_t i = 0;
  for (; i + LANES <= m; i += LANES) store(y + i, look_up(table, codes + i));
  for (; i < m; ++i) y[i] = table[codes[i]];
}

template <int BITS>
static void dequantize_rotated(const uint8_t* packed, int64_t m, float* y, uint8_t* codes) {
  float table[16];
  rotation_table<BITS>(table);
  rotation_values<BITS>(packed, m, table, y, codes);
}

// A whole block; out may have any alignment. work: 2 * BLOCK_MAX floats.
[[maybe_unused]] static void dequantize_rotated(const PacketView& p, const Segment& s, float* out,
                                                float* work) {
  const int64_t m = hadamard_size(s.n);
  const float scale = load<float>(s.scales(p));
  if (scale == 0) {
    __builtin_memset(out, 0, size_t(s.n) * 4);
    return;
  }
  uint8_t* codes = reinterpret_cast<uint8_t*>(work + m);
  switch (p.bits) {
    case 1: dequantize_rotated<1>(s.codes(p), m, work, codes); break;
    case 2: dequantize_rotated<2>(s.codes(p), m, work, codes); break;
    case 3: dequantize_rotated<3>(s.codes(p), m, work, codes); break;
    default: dequantize_rotated<4>(s.codes(p), m, work, codes); break;
  }
  hadamard(work, m);
  HadamardSigns signs;
  signs.make(philox_stream(p.seed, uint32_t(p.round), STREAM_ROTATION, 0), s.bucket * p.bucket, m);
  rotation_backward(work, s.n, signs, scale * hadamard_norm(m), out);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
