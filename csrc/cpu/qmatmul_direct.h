// Few rows of x: every code is decoded once, in registers, and multiplied with all of them. A block
// of 16 rows of W is one stream of codes; nothing is summed across lanes.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_decode.h"
#include "cpu/qmatmul_rows.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

// Rows of x that fit into the registers beside codes.
constexpr int DIRECT_ROWS = LANES == 16 ? 8 : LANES == 8 ? 6 : 2;
constexpr int64_t AHEAD = 2048;  // bytes; a page ends the hardware's own prefetch

FLCORE_INLINE void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + AHEAD + i);
}

// total += scale (sum - offset sum(x)) + zero sum(x)
FLCORE_INLINE void add_group(const GroupRows& g, bool sums, bool float_zero, float sum_x,
                             const Rows& sum, Rows* total) {
  const vf32 sx = vf32{} + sum_x;
  for (int p = 0; p < PARTS; ++p) {
    vf32 t = sum.v[p];
    if (sums) t = mac(-g.offset.v[p], sx, t);
    if (float_zero)
      total->v[p] += fused(g.scale.v[p], t, g.zero.v[p] * sx);
    else
      total->v[p] = mac(g.scale.v[p], t, total->v[p]);
  }
}

// Everything but the block that a direct kernel needs.
struct Direct {
  const QMatmulArgs* a;
  Cut cut;
  const Levels* levels;
  const void* x;      // packed for R rows
  const float* sums;  // [segments][R] or null
  int base;
};

template <int CODE, int R>
static void direct_block(const Direct& d, int64_t b, float* up) {
  const QMatmulArgs& a = *d.a;
  const uint8_t* codes = block_codes(a.w, b);
  const float* x = static_cast<const float*>(d.x);
  const bool float_zero = a.w.kind == QW_FLOAT_ZERO;
  constexpr int CHAINS = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums that do not wait for each other
  Rows total[R];
  for (int r = 0; r < R; ++r) total[r] = same(0.0f);
  for_segments(d.cut, [&](int64_t g, int64_t s, int64_t h, int64_t end) FLCORE_LAMBDA {
    // before the sums are in registers, none of which outlives a call
    const GroupRows group = group_rows(a.w, d.base, b * d.cut.groups + g);
    Rows sum[R][CHAINS];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < CHAINS; ++i) sum[r][i] = same(0.0f);
    for (; h < end; ++h) {
      prefetch(half_codes(codes, code_bits(CODE), h), 32 * code_bits(CODE));
      const float* xh = x + h * HALF * R;
      decode_half<CODE>(codes, h, *d.levels, [&](auto jc, const Rows& w) FLCORE_LAMBDA {
        constexpr int j = decltype(jc)::value;
        unroll<R>([&](auto rc) FLCORE_LAMBDA {
          constexpr int r = decltype(rc)::value;
          const vf32 xv = vf32{} + xh[j * R + r];
          unroll<PARTS>([&](auto pc) FLCORE_LAMBDA {
            constexpr int p = decltype(pc)::value;
            sum[r][j % CHAINS].v[p] = mac(w.v[p], xv, sum[r][j % CHAINS].v[p]);
          });
        });
      });
    }
    unroll<R>([&](auto rc) FLCORE_LAMBDA {
      constexpr int r = decltype(rc)::value;
      for (int width = CHAINS / 2; width; width /= 2)
        for (int i = 0; i < width; ++i)
          for (int p = 0; p < PARTS; ++p) sum[r][i].v[p] += sum[r][i + width].v[p];
      add_group(group, d.sums, float_zero, d.sums ? d.sums[s * R + r] : 0.0f, sum[r][0], &total[r]);
    });
  });
  if (a.rank) turn_up(a, b * ROWS, ROWS, up);
  for (int r = 0; r < R && r < a.m; ++r) finish_rows(a, r, b * ROWS, total[r], up);
}

typedef void (*DirectBlock)(const Direct&, int64_t, float*);
typedef void (*PackRows)(const QMatmulArgs&, const Cut&, int64_t, int64_t, int64_t, float*);

// Rows that a kernel is built for; the ones that are missing count as zeros.
FLCORE_INLINE int direct_rows(int64_t m) {
  const int sizes[] = {1, 2, 4, 6, 8};
  for (int r : sizes)
    if (m <= r) return r;
  return 8;
}

template <int CODE>
static DirectBlock direct_for(int rows) {
  if (rows == 1) return direct_block<CODE, 1>;
  if (rows == 2 || DIRECT_ROWS < 4) return direct_block<CODE, 2>;
  if constexpr (DIRECT_ROWS >= 4) {
    if (rows == 4) return direct_block<CODE, 4>;
    if (rows == 6 || DIRECT_ROWS < 8) return direct_block<CODE, 6>;
    if constexpr (DIRECT_ROWS >= 8) return direct_block<CODE, 8>;
  }
  return nullptr;
}

static DirectBlock direct_kernel(int code, int rows) {
  switch (code) {
    case INT2: return direct_for<INT2>(rows);
    case INT3: return direct_for<INT3>(rows);
    case INT4: return direct_for<INT4>(rows);
    case INT8: return direct_for<INT8>(rows);
#if !defined(__AVX512F__)
    case TABLE4: return direct_for<TABLE4>(rows);
#endif
    default: return direct_for<FP8>(rows);
  }
}

static PackRows pack_kernel(int code) {
  switch (code) {
    case INT2: case INT3: return pack_floats<INT2>;
    case INT4: case TABLE4: return pack_floats<INT4>;
    default: return pack_floats<INT8>;
  }
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
