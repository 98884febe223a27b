// What the products with quantized weights share: how K is cut, x in the order of the codes, and
// the end of a row: bias, product of low rank, storage type.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_decode.h"
#include "cpu/qweight.h"
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
  c.blocks = block_count(w);
  c.halves = 2 * chunk_count(w);
  c.groups = group_count(w);
  c.group = w.group >= w.k ? c.halves : w.group / HALF;
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

// The 16 values of row m from half h on, zeros past K.
FLCORE_NOINLINE Rows load_half(const QMatmulArgs& a, int64_t m, int64_t h) {
  const int64_t k = h * HALF, at = m * a.x_stride + k;
  if (k + HALF <= a.w.k) return load_rows(a.x, a.x_dtype, at);
  float v[HALF] = {};
  for (int64_t i = 0; k + i < a.w.k; ++i) v[i] = load1(a.x_dtype, a.x, at + i);
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
  for (int c = 0; c < PARTS; ++c) store_lanes<D>(y, at + c * LANES, r.v[c]);
}

// y[m][n0 ..] = sum + bias + low up^T; `up` from turn_up.
FLCORE_NOINLINE void finish_rows(const QMatmulArgs& a, int64_t m, int64_t n0, Rows sum,
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
  for (int64_t r = 0; r < rows; ++r) store1(a.y_dtype, a.y, at + r, v[r]);
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
