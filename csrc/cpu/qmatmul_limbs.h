// Few rows of x that bfloat16 does not hold: x becomes whole numbers of 31 bits, relative to the
// largest of its segment, in four digits of 8 bits, and codes are multiplied with each digit by
// 64 products an instruction (AVX512_VNNI). Sums of digits are exact, zeros included; what x loses
// is 2^-31 of the largest value beside it, less than the rounding of a float32 sum they meet in.
#pragma once

#if defined(__AVX512VNNI__)

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_decode.h"
#include "cpu/qmatmul_direct.h"
#include "cpu/qmatmul_rows.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int LIMBS = 4, QUADS = HALF / 4, TOP_BIT = 30;
constexpr int LIMB_ROWS = 4;  // rows of x whose sums fit in the registers

// What a row of x has in a segment.
struct LimbSums {
  int32_t digit[LIMBS];  // sums
  float unit;            // x is `unit` times the whole number; NaN where x is not finite
  float x;               // sum of x
};

// Rows 0 .. count of x: to[((4 h + quad) * rows + r) * 4 + limb] holds four digits.
static void pack_limbs(const QMatmulArgs& a, const Cut& c, int64_t rows, uint32_t* to,
                       LimbSums* sums) {
  for (int64_t r = 0; r < rows; ++r)
    for_segments(c, [&](int64_t, int64_t s, int64_t h0, int64_t end) {
      __m512 top = _mm512_setzero_ps(), all = _mm512_setzero_ps();
      __mmask16 odd = 0;
      for (int64_t h = h0; h < end && r < a.m; ++h) {
        const __m512 x = (__m512)load_half(a, r, h).v[0];
        const __m512 size = (__m512)((vu32)x & 0x7fffffffu);
        odd |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
        top = _mm512_maskz_max_ps(ALL, top, size);
        all = all + x;
      }
      Rows lanes;
      lanes.v[0] = (vf32)top;
      float most[ROWS];
      store(most, lanes.v[0]);
      for (int width = ROWS / 2; width; width /= 2)
        for (int i = 0; i < width; ++i)
          if (most[i] < most[i + width]) most[i] = most[i + width];
      LimbSums& sum = sums[s * rows + r];
      lanes.v[0] = (vf32)all;
      sum.x = add_up(lanes);
      int power = int(bits_of(most[0]) >> 23) - 126;  // |x| < 2^power
      if (power < TOP_BIT - 126) power = TOP_BIT - 126;  // the unit is a normal number
      sum.unit = odd ? __builtin_nanf("") : float_of(uint32_t(127 + power - TOP_BIT) << 23);
      const __m512 shift = _mm512_set1_ps(float(TOP_BIT - power));
      __m512i total[LIMBS];
      for (int l = 0; l < LIMBS; ++l) total[l] = _mm512_setzero_si512();
      for (int64_t h = h0; h < end; ++h) {
        __m512i q = _mm512_setzero_si512();
        if (r < a.m && !odd)
          q = _mm512_maskz_cvtps_epi32(
              ALL, _mm512_maskz_scalef_ps(ALL, (__m512)load_half(a, r, h).v[0], shift));
        for (int l = 0; l < LIMBS; ++l) {
          const __m512i digit = _mm512_maskz_srai_epi32(
              ALL, _mm512_maskz_slli_epi32(ALL, q, l < LIMBS - 1 ? 24 : 0), l < LIMBS - 1 ? 24 : 0);
          total[l] = _mm512_add_epi32(total[l], digit);
          q = _mm512_maskz_srai_epi32(ALL, _mm512_sub_epi32(q, digit), 8);
          uint32_t quads[QUADS];
          store(quads, _mm512_maskz_cvtepi32_epi8(ALL, digit));
          for (int i = 0; i < QUADS; ++i) to[((h * QUADS + i) * rows + r) * LIMBS + l] = quads[i];
        }
      }
      for (int l = 0; l < LIMBS; ++l) {
        int32_t v[ROWS];
        store(v, total[l]);
        sum.digit[l] = 0;
        for (int i = 0; i < ROWS; ++i) sum.digit[l] += v[i];
      }
    });
}

// body(Const<i>(), codes): codes of the four k from 4 i on, a byte each, of 16 rows.
template <int CODE, class Body>
FLCORE_INLINE void decode_quads(const uint8_t* block, int64_t h, const Body& body) {
  __m512i words[4];
  load_half_codes<CODE>(half_codes(block, code_bits(CODE), h), h, words);
  const __m512i three = _mm512_set1_epi8(3), seven = _mm512_set1_epi8(7);
  const __m512i nibble = _mm512_set1_epi8(15);
  unroll<QUADS>([&](auto ic) FLCORE_LAMBDA {
    constexpr int i = decltype(ic)::value;
    __m512i q;
    if constexpr (CODE == INT4) {
      q = _mm512_and_si512(_mm512_maskz_srli_epi32(ALL, words[i / 2], 4 * (i % 2)), nibble);
    } else if constexpr (CODE == INT2) {
      q = _mm512_and_si512(_mm512_maskz_srli_epi32(ALL, words[0], 2 * i), three);
    } else if constexpr (CODE == INT3) {
      const int shift = i + (h & 1 ? 4 : 0);  // of the high bit, which goes to bit 2
      const __m512i up =
          _mm512_maskz_rorv_epi32(ALL, words[1], _mm512_set1_epi32((shift + 30) & 31));
      const __m512i low = _mm512_maskz_srli_epi32(ALL, words[0], 2 * i);
      q = _mm512_and_si512(_mm512_ternarylogic_epi32(three, low, up, 0xca), seven);
    } else {
      q = words[i];
    }
    body(ic, q);
  });
}

template <int CODE, int R>
static void direct_limbs(const Direct& d, int64_t b, float* up) {
  const QMatmulArgs& a = *d.a;
  const uint8_t* codes = block_codes(a.w, b);
  const uint32_t* x = static_cast<const uint32_t*>(d.x);
  const LimbSums* sums = reinterpret_cast<const LimbSums*>(d.sums);
  const bool float_zero = a.w.kind == QW_FLOAT_ZERO;
  constexpr int SUMS = R * LIMBS, CHAINS = R == 1 ? 2 : 1;
  __m512 total[R];
  for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
  for_segments(d.cut, [&](int64_t g, int64_t s, int64_t h, int64_t end) FLCORE_LAMBDA {
    // before the sums are in registers, none of which outlives a call
    const GroupRows group = group_rows(a.w, 0, b * d.cut.groups + g);
    __m512i sum[SUMS][CHAINS];
    for (int i = 0; i < SUMS; ++i)
      for (int c = 0; c < CHAINS; ++c) sum[i][c] = _mm512_setzero_si512();
    for (; h < end; ++h) {
      prefetch(half_codes(codes, code_bits(CODE), h), 32 * code_bits(CODE));
      const uint32_t* xh = x + h * QUADS * SUMS;
      decode_quads<CODE>(codes, h, [&](auto qc, const __m512i& q) FLCORE_LAMBDA {
        constexpr int quad = decltype(qc)::value;
        unroll<SUMS>([&](auto ic) FLCORE_LAMBDA {
          constexpr int i = decltype(ic)::value;
          sum[i][quad % CHAINS] = _mm512_dpbusd_epi32(
              sum[i][quad % CHAINS], q, _mm512_set1_epi32(int(xh[quad * SUMS + i])));
        });
      });
    }
    const __m512i zero = _mm512_maskz_cvtps_epi32(ALL, (__m512)group.offset.v[0]);
    unroll<R>([&](auto rc) FLCORE_LAMBDA {
      constexpr int r = decltype(rc)::value;
      const LimbSums& own = sums[s * R + r];
      __m512 t = _mm512_setzero_ps();
      for (int l = LIMBS - 1; l >= 0; --l) {
        __m512i n = sum[r * LIMBS + l][0];
        for (int c = 1; c < CHAINS; ++c) n = _mm512_add_epi32(n, sum[r * LIMBS + l][c]);
        n = _mm512_sub_epi32(n, _mm512_mullo_epi32(zero, _mm512_set1_epi32(own.digit[l])));
        t = _mm512_fmadd_ps(t, _mm512_set1_ps(256.0f), _mm512_maskz_cvtepi32_ps(ALL, n));
      }
      t = t * _mm512_set1_ps(own.unit);
      const __m512 scale = (__m512)group.scale.v[0];
      if (float_zero)
        total[r] = total[r] + _mm512_fmadd_ps(scale, t, (__m512)(group.zero.v[0] * own.x));
      else
        total[r] = _mm512_fmadd_ps(scale, t, total[r]);
    });
  });
  if (a.rank) turn_up(a, b * ROWS, ROWS, up);
  for (int r = 0; r < R && r < a.m; ++r) {
    Rows rows;
    rows.v[0] = (vf32)total[r];
    finish_rows(a, r, b * ROWS, rows, up);
  }
}

template <int CODE>
static DirectBlock direct_limbs_for(int rows) {
  return rows == 1   ? direct_limbs<CODE, 1>
         : rows == 2 ? direct_limbs<CODE, 2>
                     : direct_limbs<CODE, 4>;
}

static DirectBlock direct_limbs_kernel(int code, int rows) {
  switch (code) {
    case INT2: return direct_limbs_for<INT2>(rows);
    case INT3: return direct_limbs_for<INT3>(rows);
    case INT4: return direct_limbs_for<INT4>(rows);
    default: return direct_limbs_for<INT8>(rows);
  }
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore

#endif
