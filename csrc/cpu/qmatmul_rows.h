// What the products with quantized weights share: how K is cut, x in the order of the codes, and
// the end of a row: bias, product of low rank, storage type.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_decode.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

// K in halves of 16, groups of them, and segments: sums of at most SEGMENT halves are finished with
// the scale of their group before the next begins.
constexpr int64_t SEGMENT = 16;

struct Cut {
  int64_t blocks, halves, groups, group, segments;  // group in halves
};

FLCORE_INLINE Cut cut_of(const QWeight& w) {
  Cut c;
  c.blocks = (w.n + ROWS - 1) / ROWS;
  c.halves = (w.k + 31) / 32 * 2;
  const bool one = w.group >= w.k;
  c.groups = w.k == 0 ? 0 : one ? 1 : (w.k + w.group - 1) / w.group;
  c.group = one ? c.halves : w.group / HALF;
  c.segments = c.groups * ((c.group + SEGMENT - 1) / SEGMENT);
  return c;
}

// body(group, segment, first half, end)
template <class Body>
FLCORE_INLINE void for_segments(const Cut& c, const Body& body) {
  int64_t segment = 0;
  for (int64_t g = 0; g < c.groups; ++g) {
    const int64_t end = g + 1 == c.groups ? c.halves : (g + 1) * c.group;
    for (int64_t h = g * c.group; h < end; h += SEGMENT, ++segment)
      body(g, segment, h, h + SEGMENT < end ? h + SEGMENT : end);
  }
}

FLCORE_INLINE const uint8_t* block_codes(const QWeight& w, const Cut& c, int64_t b) {
  return w.codes + b * (c.halves / 2) * 64 * w.bits;
}

FLCORE_INLINE float load_any(const void* p, int dtype, int64_t i) {
  return dtype == F32 ? load1<F32>(p, i) : dtype == F16 ? load1<F16>(p, i) : load1<BF16>(p, i);
}

// The 16 values of row m from half h on, zeros past K.
__attribute__((noinline)) Rows load_half(const QMatmulArgs& a, int64_t m, int64_t h) {
  const int64_t k = h * HALF, at = m * a.x_stride + k;
  if (k + HALF <= a.w.k) return load_rows(a.x, a.x_dtype, at);
  float v[HALF] = {};
  for (int64_t i = 0; k + i < a.w.k; ++i) v[i] = load_any(a.x, a.x_dtype, at + i);
  return load_rows<F32>(v, 0);
}

FLCORE_INLINE float add_up(const Rows& r) {
  float v[ROWS];
  for (int c = 0; c < PARTS; ++c) store(v + c * LANES, r.v[c]);
  for (int width = ROWS / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// Sums of each segment of rows first .. first + count: sums[segment * stride + r].
static void segment_sums(const QMatmulArgs& a, const Cut& c, int64_t first, int64_t count,
                         int64_t stride, float* sums) {
  for (int64_t r = 0; r < count; ++r)
    for_segments(c, [&](int64_t, int64_t s, int64_t h, int64_t end) {
      Rows lanes = same(0.0f);
      for (; h < end; ++h) {
        const Rows x = load_half(a, first + r, h);
        for (int p = 0; p < PARTS; ++p) lanes.v[p] += x.v[p];
      }
      sums[s * stride + r] = add_up(lanes);
    });
}

// Rows first .. first + count of x as float32: to[(16 h + j) * stride + r], in the order of CODE.
template <int CODE>
static void pack_floats(const QMatmulArgs& a, const Cut& c, int64_t first, int64_t count,
                        int64_t stride, float* to) {
  for (int64_t r = 0; r < stride; ++r) {
    for (int64_t h = 0; h < c.halves; ++h) {
      float v[HALF] = {};
      if (r < count) {
        const Rows x = load_half(a, first + r, h);
        for (int p = 0; p < PARTS; ++p) store(v + p * LANES, x.v[p]);
      }
      float* row = to + h * HALF * stride + r;
      unroll<HALF>([&](auto jc) FLCORE_LAMBDA {
        constexpr int j = decltype(jc)::value;
        row[j * stride] = v[position(CODE, j)];
      });
    }
  }
}

// ---- the end of a row ---------------------------------------------------------------------------

template <int D>
FLCORE_INLINE void store_rows(void* y, int64_t at, const Rows& r) {
#if defined(__AVX512F__)
  if constexpr (D == BF16) {  // to nearest even, NaN kept: the general conversion goes lane by lane
    const vu32 u = (vu32)r.v[0];
    const vu32 even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
    const __m512i nan = (__m512i)((u & 0x7fffffffu) > 0x7f800000u);
    const __m512i h = _mm512_ternarylogic_epi32(nan, (__m512i)quiet, (__m512i)even, 0xca);
    store(static_cast<uint16_t*>(y) + at, _mm512_maskz_cvtepi32_epi16(ALL, h));
    return;
  }
#endif
  for (int c = 0; c < PARTS; ++c) store_lanes<D>(y, at + c * LANES, r.v[c]);
}

// up of one block as [rank][16], so that one load has a column for all rows.
__attribute__((noinline)) void turn_up(const QMatmulArgs& a, int64_t n0, float* to) {
  const int64_t rows = a.w.n - n0 < ROWS ? a.w.n - n0 : ROWS;
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t i = 0; i < a.rank; ++i)
      to[i * ROWS + r] = r < rows ? a.up[(n0 + r) * a.rank + i] : 0.0f;
}

// y[m][n0 ..] = sum + bias + low up^T; `up` from turn_up.
__attribute__((noinline)) void finish_rows(const QMatmulArgs& a, int64_t m, int64_t n0, Rows sum,
                               const float* up) {
  const int64_t rows = a.w.n - n0 < ROWS ? a.w.n - n0 : ROWS;
  for (int64_t i = 0; i < a.rank; ++i) {
    const vf32 l = vf32{} + a.low[m * a.rank + i];
    for (int c = 0; c < PARTS; ++c)
      sum.v[c] = mac(l, load<vf32>(up + i * ROWS + c * LANES), sum.v[c]);
  }
  if (a.bias) {
    float bias[ROWS] = {};
    for (int64_t r = 0; r < rows; ++r) bias[r] = a.bias[n0 + r];
    for (int c = 0; c < PARTS; ++c) sum.v[c] += load<vf32>(bias + c * LANES);
  }
  const int64_t at = m * a.y_stride + n0;
  if (rows == ROWS) {
    if (a.y_dtype == F32) return store_rows<F32>(a.y, at, sum);
    if (a.y_dtype == F16) return store_rows<F16>(a.y, at, sum);
    return store_rows<BF16>(a.y, at, sum);
  }
  float v[ROWS];
  for (int c = 0; c < PARTS; ++c) store(v + c * LANES, sum.v[c]);
  for (int64_t r = 0; r < rows; ++r) {
    if (a.y_dtype == F32)
      store1<F32>(a.y, at + r, v[r]);
    else if (a.y_dtype == F16)
      store1<F16>(a.y, at + r, v[r]);
    else
      store1<BF16>(a.y, at + r, v[r]);
  }
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
