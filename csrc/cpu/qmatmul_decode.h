// Codes of the layout tile16 to numbers: one k of the 16 rows of a block at a time, as float32.
// Half a chunk, 16 k, is the unit; its positions come in the order that `position` tells, which is
// that of the shifts and costs nothing where x is put into it first.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/fma.h"
#include "cpu/fp8.h"
#include "cpu/int_lanes.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int ROWS = 16;             // of a block
constexpr int HALF = 16;             // k of a unit
constexpr int PARTS = ROWS / LANES;  // vectors that hold a number for each row of a block

#if defined(__AVX512F__)
constexpr __mmask16 ALL = 0xffff;  // gcc 12 warns of the forms without a mask
#endif

struct Rows {  // a number for each row of a block
  vf32 v[PARTS];
};

// TABLE4 stands for INT4 where 16 levels need more than one instruction.
enum Code : int { INT2, INT3, INT4, INT8, FP8, TABLE4, CODE_COUNT };

constexpr int code_bits(int code) {
  return code == INT2 ? 2 : code == INT3 ? 3 : code == INT4 || code == TABLE4 ? 4 : 8;
}

// The integers that INT codes decode to are q - code_base.
constexpr int code_base(int code) {
#if defined(__AVX512F__)
  return code == INT2 ? 2 : code == INT3 ? 4 : code == INT4 ? 8 : code == INT8 ? 128 : 0;
#else
  (void)code;
  return 0;
#endif
}

// What codes stand for: those of 2 to 4 bits, which repeat, or the first of FP8.
struct Levels {
  alignas(64) float of[32];
  Fp8 fp8;
};

constexpr int position(int code, int j) {  // k of the j-th number of a half
  return code == INT4 || code == TABLE4 ? 8 * (j / 8) + ((j % 8) >> 1) + 4 * (j & 1)
         : code == INT2 || code == INT3 ? 4 * (j % 4) + j / 4
                                        : j;
}

FLCORE_INLINE const uint8_t* half_codes(const uint8_t* block, int bits, int64_t h) {
  return bits == 3 ? block + (h >> 1) * 192 + (h & 1) * 64 : block + h * (32 * bits);
}

// a * b + c with one rounding at every level, for weights with a floating zero.
#if defined(__AVX2__)
FLCORE_INLINE vf32 fused(const vf32& a, const vf32& b, const vf32& c) { return vfma(a, b, c); }
#else
FLCORE_NOINLINE vf32 fused(const vf32& a, const vf32& b, const vf32& c) {
  return vfma(a, b, c);
}
#endif

void make_levels(const QWeight& w, Levels* levels) {
  levels->fp8 = fp8_of(w.kind);
  vi32 q;
  for (int k = 0; k < LANES; ++k) q[k] = k;
  for (int i = 0; i < 32; i += LANES, q += LANES) {
    const int codes = 1 << w.bits;
    vf32 x = to_float((q & (codes - 1)) - codes / 2);
    if (w.kind == QW_TABLE) x = look_up(w.table, q);
    if (w.kind == QW_E4M3 || w.kind == QW_E5M2) x = fp8_values(q, levels->fp8);
    store(levels->of + i, x);
  }
}

#if defined(__AVX512F__)
// Kept in a register: compilers would rather load it again for every shift.
FLCORE_INLINE __m512i load_codes(const uint8_t* p) {
  __m512i w = _mm512_loadu_si512(p);
  __asm__("" : "+v"(w));
  return w;
}

// The vectors of a half; the last one of INT3 has the high bits.
template <int CODE>
FLCORE_INLINE void load_half_codes(const uint8_t* at, int64_t h, __m512i* w) {
  constexpr int COUNT = CODE == INT2 || CODE == INT3 ? 1 : code_bits(CODE) / 2;
  unroll<COUNT>([&](auto vc) FLCORE_LAMBDA {
    w[decltype(vc)::value] = load_codes(at + 64 * decltype(vc)::value);
  });
  if constexpr (CODE == INT3) w[1] = load_codes(at + (h & 1 ? 64 : 128));
}
#endif

// body(Const<j>(), Rows) for j of 0 .. 15: the number of position(CODE, j), for each row.
template <int CODE, class Body>
FLCORE_INLINE void decode_half(const uint8_t* block, int64_t h, const Levels& levels,
                               const Body& body) {
  const uint8_t* at = half_codes(block, code_bits(CODE), h);
#if defined(__AVX512F__)
  __m512 table = _mm512_setzero_ps();
  if constexpr (CODE != INT8 && CODE != FP8) table = _mm512_load_ps(levels.of);
  __m512i words[4];
  load_half_codes<CODE>(at, h, words);
  unroll<HALF>([&](auto jc) FLCORE_LAMBDA {
    constexpr int j = decltype(jc)::value;
    __m512 x;
    if constexpr (CODE == INT4 || CODE == TABLE4) {
      const __m512i w = words[j / 8];
      x = _mm512_maskz_permutexvar_ps(ALL, _mm512_maskz_srli_epi32(ALL, w, 4 * (j % 8)), table);
    } else if constexpr (CODE == INT2) {
      const __m512i index = _mm512_maskz_srli_epi32(ALL, words[0], 2 * j);
      x = _mm512_maskz_permutexvar_ps(ALL, index, table);
    } else if constexpr (CODE == INT3) {
      constexpr int byte = j / 4, t = j % 4;
      const __m512i w = _mm512_maskz_srli_epi32(ALL, words[0], 2 * j);
      const int shift = 8 * byte + t + (h & 1 ? 4 : 0);  // of the high bit, which goes to bit 2
      const __m512i up =
          _mm512_maskz_rorv_epi32(ALL, words[1], _mm512_set1_epi32((shift + 30) & 31));
      const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi32(3), w, up, 0xca);
      x = _mm512_maskz_permutexvar_ps(ALL, index, table);
    } else if constexpr (CODE == INT8) {
      const __m512i w =
          _mm512_xor_si512(words[j / 4], _mm512_set1_epi32(int(0x80808080u)));
      const __m512i q = _mm512_maskz_srai_epi32(
          ALL,
          _mm512_maskz_slli_epi32(ALL, w, 24 - 8 * (j % 4)), 24);
      x = _mm512_maskz_cvtepi32_ps(ALL, q);
    } else {
      const __m512i w = words[j / 4];
      const __m512i q = _mm512_maskz_srli_epi32(ALL, w, 8 * (j % 4));
      x = (__m512)fp8_values((vi32)q, levels.fp8);
    }
    Rows rows;
    rows.v[0] = (vf32)x;
    body(jc, rows);
  });
#else
  unroll<HALF>([&](auto jc) FLCORE_LAMBDA {
    constexpr int j = decltype(jc)::value;
    Rows rows;
    unroll<PARTS>([&](auto pc) FLCORE_LAMBDA {
      constexpr int p = decltype(pc)::value;
      const auto word = [&](int offset) FLCORE_LAMBDA {
        return load<vu32>(at + offset + VEC_BYTES * p);
      };
      vu32 q;
      if constexpr (CODE == INT4 || CODE == TABLE4) {
        q = (word(64 * (j / 8)) >> (4 * (j % 8))) & 15u;
      } else if constexpr (CODE == INT2) {
        q = (word(0) >> (2 * j)) & 3u;
      } else if constexpr (CODE == INT3) {
        const uint32_t shift = 8 * (j / 4) + j % 4 + (h & 1 ? 4 : 0);
        q = ((word(0) >> (2 * j)) & 3u) | (((word(h & 1 ? 64 : 128) >> shift) & 1u) << 2);
      } else {
        q = (word(64 * (j / 4)) >> (8 * (j % 4))) & 255u;
      }
      if constexpr (CODE == TABLE4) {
        rows.v[p] = look_up(levels.of, (vi32)q);
      } else if constexpr (CODE == FP8) {
        rows.v[p] = fp8_values((vi32)q, levels.fp8);
      } else {
        rows.v[p] = __builtin_convertvector((vi32)q, vf32);
      }
    });
    body(jc, rows);
  });
#endif
}

// ---- scales and zeros ---------------------------------------------------------------------------

template <int D>
FLCORE_INLINE Rows load_rows(const void* p, int64_t i) {
  Rows r;
  for (int c = 0; c < PARTS; ++c) r.v[c] = load_f32<D>(p, i + c * LANES);
  return r;
}

FLCORE_INLINE Rows load_rows(const void* p, int dtype, int64_t i) {
  Rows r;
  for (int c = 0; c < PARTS; ++c) r.v[c] = load_f32(dtype, p, i + c * LANES);
  return r;
}

FLCORE_INLINE Rows same(float x) {
  Rows r;
  for (int c = 0; c < PARTS; ++c) r.v[c] = vf32{} + x;
  return r;
}

// What turns a sum of x (q - base) over k of one group into one of x w:
//   t = sum - offset sum(x);  plain: scale t;  float zero: scale t + zero sum(x)
struct GroupRows {
  Rows scale, offset, zero;
};

FLCORE_NOINLINE GroupRows group_rows(const QWeight& w, int base, int64_t group) {
  GroupRows g;
  const int64_t i = group * ROWS;
  g.scale = load_rows(w.scales, w.scale_dtype, i);
  g.zero = same(0.0f);
  g.offset = same(w.kind == QW_INT || w.kind == QW_FLOAT_ZERO ? float((1 << (w.bits - 1)) - base)
                                                              : 0.0f);
  if (w.kind == QW_FLOAT_ZERO) g.zero = load_rows(w.zeros, w.scale_dtype, i);
  if (w.kind == QW_INT && w.zeros) {
    const uint8_t* z = static_cast<const uint8_t*>(w.zeros) + i;
    for (int c = 0; c < PARTS; ++c) g.offset.v[c] = to_float(load_u8(z + c * LANES)) - float(base);
  }
  return g;
}

// Whether sums of x are wanted at all.
inline bool needs_sums(const QWeight& w, int base) {
  return w.kind == QW_FLOAT_ZERO ||
         (w.kind == QW_INT && (w.zeros != nullptr || base != 1 << (w.bits - 1)));
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
