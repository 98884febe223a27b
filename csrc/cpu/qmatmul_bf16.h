// Products of bfloat16 pairs (AVX512_BF16): 32 codes an instruction. x is bfloat16; integer codes
// and FP8 are exact in it, levels of a table are rounded to it, as the weight is where QLoRA (arXiv
// 2305.14314, equation 5) multiplies. Scales are applied to float32 sums, once a segment.
#pragma once

#if defined(__AVX512BF16__)

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_decode.h"
#include "cpu/qmatmul_direct.h"
#include "cpu/qmatmul_panel.h"
#include "cpu/qmatmul_rows.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int PAIRS = HALF / 2;
static_assert(SEGMENT * PAIRS * PANEL_COLUMNS <= PANEL_FLOATS, "a segment does not fit in a panel");
constexpr __mmask32 ALL_WORDS = 0xffffffffu;

// k of the first of the pair p of a half; the second is two further.
constexpr int pair_first(int code, int p) {
  return code == INT4 || code == TABLE4 ? 8 * (p / 4) + ((p % 4) & 1) * 4 + (p % 4) / 2
         : code == INT2 || code == INT3 ? 4 * (p % 4) + p / 4
                                        : 4 * (p / 2) + p % 2;
}

// Words that a lookup with 5 bits of an index finds.
struct PairLevels {
  __m512i words;
  bool e5m2;
};

FLCORE_NOINLINE PairLevels pair_levels(const QWeight& w, const Levels& levels) {
  alignas(64) uint16_t t[32];
  for (int i = 0; i < 32; ++i) {
    const uint32_t u = bits_of(levels.of[i]);
    t[i] = uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);  // to nearest even; only tables need it
  }
  return PairLevels{_mm512_load_si512(t), w.kind == QW_E5M2};
}

// Finite FP8 in the low byte of each word to bfloat16; subnormals are looked up.
FLCORE_INLINE __m512i fp8_words(const __m512i& q, const PairLevels& t) {
  const __m512i body = _mm512_and_si512(q, _mm512_set1_epi16(0x7f));
  const __m512i sign =
      _mm512_maskz_slli_epi16(ALL_WORDS, _mm512_and_si512(q, _mm512_set1_epi16(0x80)), 8);
  const __m512i up = t.e5m2 ? _mm512_maskz_slli_epi16(ALL_WORDS, body, 5)
                            : _mm512_maskz_slli_epi16(ALL_WORDS, body, 4);
  const __m512i bias = _mm512_set1_epi16(t.e5m2 ? 112 << 7 : 120 << 7);
  const __mmask32 tiny = _mm512_testn_epi16_mask(q, _mm512_set1_epi16(t.e5m2 ? 0x7c : 0x78));
  const __m512i x = _mm512_add_epi16(up, bias);
  return _mm512_or_si512(sign, _mm512_mask_permutexvar_epi16(x, tiny, body, t.words));
}

// body(Const<p>(), words): pair p of 16 rows.
template <int CODE, class Body>
FLCORE_INLINE void decode_pairs(const uint8_t* block, int64_t h, const PairLevels& t,
                                const Body& body) {
  __m512i words[4];
  load_half_codes<CODE>(half_codes(block, code_bits(CODE), h), h, words);
  unroll<PAIRS>([&](auto pc) FLCORE_LAMBDA {
    constexpr int p = decltype(pc)::value;
    if constexpr (CODE == INT4) {
      const __m512i w = words[p / 4];
      const __m512i index = _mm512_maskz_srli_epi32(ALL, w, 4 * (p % 4));
      body(pc, _mm512_maskz_permutexvar_epi16(ALL_WORDS, index, t.words));
    } else if constexpr (CODE == INT2 || CODE == INT3) {
      constexpr int byte = p / 4, field = p % 4;
      __m512i index = _mm512_maskz_srli_epi32(ALL, words[0], 8 * byte + 2 * field);
      if constexpr (CODE == INT3) {
        const int shift = 8 * byte + field + (h & 1 ? 4 : 0);
        const __m512i up =
            _mm512_maskz_rorv_epi32(ALL, words[1], _mm512_set1_epi32((shift + 30) & 31));
        index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), index, up, 0xca);
      }
      body(pc, _mm512_maskz_permutexvar_epi16(ALL_WORDS, index, t.words));
    } else if constexpr (CODE == FP8) {
      const __m512i w = words[p / 2];
      const __m512i q = _mm512_maskz_srli_epi16(ALL_WORDS, w, 8 * (p % 2));
      const __m512i bytes = p % 2 ? q : _mm512_and_si512(q, _mm512_set1_epi16(0xff));
      body(pc, fp8_words(bytes, t));
    } else {
      const __m512i w = _mm512_xor_si512(words[p / 2],
                                         _mm512_set1_epi32(int(0x80808080u)));
      const __m512i low = _mm512_maskz_srai_epi32(
          ALL, _mm512_maskz_slli_epi32(ALL, w, 24 - 8 * (p % 2)), 24);
      const __m512i up = _mm512_maskz_srai_epi32(
          ALL, _mm512_maskz_slli_epi32(ALL, w, 8 - 8 * (p % 2)), 24);
      const __m512i a = _mm512_castps_si512(_mm512_maskz_cvtepi32_ps(ALL, low));
      const __m512i b = _mm512_castps_si512(_mm512_maskz_cvtepi32_ps(ALL, up));
      body(pc, _mm512_or_si512(_mm512_maskz_srli_epi32(ALL, a, 16), b));
    }
  });
}

FLCORE_INLINE __m512 dot_pairs(const __m512& sum, const __m512i& w, const __m512i& x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}

// Rows first .. first + count of x: to[(8 h + p) * stride + r] holds the pair p.
template <int CODE>
static void pack_pairs(const QMatmulArgs& a, const Cut& c, int64_t first, int64_t count,
                       int64_t stride, float* to) {
  uint32_t* out = reinterpret_cast<uint32_t*>(to);
  for (int64_t r = 0; r < stride; ++r) {
    for (int64_t h = 0; h < c.halves; ++h) {
      uint16_t v[HALF] = {};
      const int64_t k = h * HALF, left = a.w.k - k < HALF ? a.w.k - k : HALF;
      if (r < count && left > 0)
        __builtin_memcpy(v, static_cast<const uint16_t*>(a.x) + (first + r) * a.x_stride + k,
                         size_t(2 * left));
      uint32_t* row = out + h * PAIRS * stride + r;
      unroll<PAIRS>([&](auto pc) FLCORE_LAMBDA {
        constexpr int p = decltype(pc)::value, at = pair_first(CODE, p);
        row[p * stride] = v[at] | uint32_t(v[at + 2]) << 16;
      });
    }
  }
}

// ---- few rows -----------------------------------------------------------------------------------

template <int CODE, int R>
static void direct_pairs(const Direct& d, int64_t b, float* up) {
  const QMatmulArgs& a = *d.a;
  const uint8_t* codes = block_codes(a.w, b);
  const uint32_t* x = static_cast<const uint32_t*>(d.x);
  const PairLevels levels = pair_levels(a.w, *d.levels);
  const bool float_zero = a.w.kind == QW_FLOAT_ZERO;
  constexpr int CHAINS = R <= 2 ? 4 : R <= 4 ? 2 : 1;
  Rows total[R];
  for (int r = 0; r < R; ++r) total[r] = same(0.0f);
  for_segments(d.cut, [&](int64_t g, int64_t s, int64_t h, int64_t end) FLCORE_LAMBDA {
    // before the sums are in registers, none of which outlives a call
    const GroupRows group = group_rows(a.w, d.base, b * d.cut.groups + g);
    __m512 sum[R][CHAINS];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < CHAINS; ++c) sum[r][c] = _mm512_setzero_ps();
    for (; h < end; ++h) {
      prefetch(half_codes(codes, code_bits(CODE), h), 32 * code_bits(CODE));
      const uint32_t* xh = x + h * PAIRS * R;
      decode_pairs<CODE>(codes, h, levels, [&](auto pc, const __m512i& w) FLCORE_LAMBDA {
        constexpr int p = decltype(pc)::value;
        unroll<R>([&](auto rc) FLCORE_LAMBDA {
          constexpr int r = decltype(rc)::value;
          sum[r][p % CHAINS] =
              dot_pairs(sum[r][p % CHAINS], w, _mm512_set1_epi32(int(xh[p * R + r])));
        });
      });
    }
    unroll<R>([&](auto rc) FLCORE_LAMBDA {
      constexpr int r = decltype(rc)::value;
      __m512 t = sum[r][0];
      for (int c = 1; c < CHAINS; ++c) t = t + sum[r][c];
      Rows rows;
      rows.v[0] = (vf32)t;
      add_group(group, d.sums, float_zero, d.sums ? d.sums[s * R + r] : 0.0f, rows, &total[r]);
    });
  });
  if (a.rank) turn_up(a, b * ROWS, ROWS, up);
  for (int r = 0; r < R && r < a.m; ++r) finish_rows(a, r, b * ROWS, total[r], up);
}

template <int CODE>
static DirectBlock direct_pairs_for(int rows) {
  return rows == 1   ? direct_pairs<CODE, 1>
         : rows == 2 ? direct_pairs<CODE, 2>
         : rows == 4 ? direct_pairs<CODE, 4>
         : rows == 6 ? direct_pairs<CODE, 6>
                     : direct_pairs<CODE, 8>;
}

static DirectBlock direct_pairs_kernel(int code, int rows) {
  switch (code) {
    case INT2: return direct_pairs_for<INT2>(rows);
    case INT3: return direct_pairs_for<INT3>(rows);
    case INT4: return direct_pairs_for<INT4>(rows);
    default: return direct_pairs_for<FP8>(rows);
  }
}

static PackRows pack_pairs_kernel(int code) {
  switch (code) {
    case INT2: case INT3: return pack_pairs<INT2>;
    case INT4: return pack_pairs<INT4>;
    default: return pack_pairs<INT8>;
  }
}

// ---- many rows ----------------------------------------------------------------------------------

struct GroupColumns {  // GroupRows of a panel, each [PANEL_COLUMNS]
  const float *scale, *offset, *zero;
};

// total[r][column] takes the sum of a segment.
template <int R>
static void tile_pairs(const uint32_t* x, const char* panel, int64_t pairs, const GroupColumns& g,
                       const float* sums, bool float_zero, float* total) {
  __m512 sum[R][PANEL_VECTORS];
  unroll<R * PANEL_VECTORS>([&](auto ic) FLCORE_LAMBDA {
    constexpr int i = decltype(ic)::value;
    sum[i / PANEL_VECTORS][i % PANEL_VECTORS] = _mm512_setzero_ps();
  });
  for (int64_t i = 0; i < pairs; ++i) {
    __m512i w[PANEL_VECTORS];
    unroll<PANEL_VECTORS>([&](auto cc) FLCORE_LAMBDA {
      constexpr int c = decltype(cc)::value;
      w[c] = _mm512_load_si512(panel + (i * PANEL_VECTORS + c) * 64);
    });
    unroll<R>([&](auto rc) FLCORE_LAMBDA {
      constexpr int r = decltype(rc)::value;
      const __m512i xv = _mm512_set1_epi32(int(x[i * R + r]));
      unroll<PANEL_VECTORS>([&](auto cc) FLCORE_LAMBDA {
        constexpr int c = decltype(cc)::value;
        sum[r][c] = dot_pairs(sum[r][c], w[c], xv);
      });
    });
  }
  unroll<PANEL_VECTORS>([&](auto cc) FLCORE_LAMBDA {
    constexpr int c = decltype(cc)::value;
    const vf32 scale = load<vf32>(g.scale + c * LANES), offset = load<vf32>(g.offset + c * LANES);
    const vf32 zero = load<vf32>(g.zero + c * LANES);
    unroll<R>([&](auto rc) FLCORE_LAMBDA {
      constexpr int r = decltype(rc)::value;
      float* at = total + r * PANEL_COLUMNS + c * LANES;
      const vf32 sx = vf32{} + (sums ? sums[r] : 0.0f);
      const vf32 t = sums ? vfma(-offset, sx, (vf32)sum[r][c]) : (vf32)sum[r][c];
      if (float_zero)
        store(at, load<vf32>(at) + vfma(scale, t, zero * sx));
      else
        store(at, vfma(scale, t, load<vf32>(at)));
    });
  });
}

FLCORE_INLINE void tile_pairs_of(int rows, const uint32_t* x, const char* panel, int64_t pairs,
                                 const GroupColumns& g, const float* sums, bool float_zero,
                                 float* total) {
  switch (rows) {
    case 6: return tile_pairs<6>(x, panel, pairs, g, sums, float_zero, total);
    case 5: return tile_pairs<5>(x, panel, pairs, g, sums, float_zero, total);
    case 4: return tile_pairs<4>(x, panel, pairs, g, sums, float_zero, total);
    case 3: return tile_pairs<3>(x, panel, pairs, g, sums, float_zero, total);
    case 2: return tile_pairs<2>(x, panel, pairs, g, sums, float_zero, total);
    default: return tile_pairs<1>(x, panel, pairs, g, sums, float_zero, total);
  }
}

template <int CODE>
static void panel_pairs(const Batch& q, int64_t b, char* scratch) {
  const QWeight& w = q.a->w;
  const PanelParts parts = PanelParts::of(*q.a, scratch);
  const PairLevels levels = pair_levels(w, *q.levels);
  const int64_t rows = q.tiles.start(q.tiles.count);
  const bool float_zero = w.kind == QW_FLOAT_ZERO;
  char* panel = reinterpret_cast<char*>(parts.panel);
  __builtin_memset(parts.total, 0, size_t(4 * rows * PANEL_COLUMNS));
  float* const scale = parts.group;
  float* const offset = scale + PANEL_COLUMNS;
  float* const zero = offset + PANEL_COLUMNS;
  for_segments(q.cut, [&](int64_t g, int64_t s, int64_t h, int64_t end) {
    for (int i = 0; i < PANEL_BLOCKS; ++i) {
      char* column = panel + 64 * i;
      const bool real = b + i < q.cut.blocks;
      GroupRows group = {};
      if (real) group = group_rows(w, q.base, (b + i) * q.cut.groups + g);
      store(scale + i * ROWS, group.scale.v[0]);
      store(offset + i * ROWS, group.offset.v[0]);
      store(zero + i * ROWS, group.zero.v[0]);
      const uint8_t* codes = block_codes(w, real ? b + i : b);
      for (int64_t at = h; at < end; ++at) {
        char* to = column + (at - h) * PAIRS * 64 * PANEL_VECTORS;
        prefetch(half_codes(codes, code_bits(CODE), at), 32 * code_bits(CODE));
        decode_pairs<CODE>(codes, at, levels, [&](auto pc, const __m512i& v) FLCORE_LAMBDA {
          _mm512_store_si512(to + decltype(pc)::value * 64 * PANEL_VECTORS, v);
        });
      }
    }
    for (int64_t t = 0; t < q.tiles.count; ++t) {
      const int size = q.tiles.size(t);
      const int64_t start = q.tiles.start(t);
      const uint32_t* x = reinterpret_cast<const uint32_t*>(q.x + start * q.row_bytes);
      tile_pairs_of(size, x + h * PAIRS * size, panel, (end - h) * PAIRS,
                    GroupColumns{scale, offset, zero},
                    q.sums ? q.sums + start * q.cut.segments + s * size : nullptr, float_zero,
                    parts.total + start * PANEL_COLUMNS);
    }
  });
  finish_panel(q, b, parts);
}

static Panel panel_pairs_kernel(int code) {
  switch (code) {
    case INT2: return panel_pairs<INT2>;
    case INT3: return panel_pairs<INT3>;
    case INT4: return panel_pairs<INT4>;
    case INT8: return panel_pairs<INT8>;
    default: return panel_pairs<FP8>;
  }
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore

#endif
