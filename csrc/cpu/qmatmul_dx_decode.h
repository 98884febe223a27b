// A chunk of a packed weight (layout tile16: 16 rows n, 32 columns k) with columns side by side,
// first as codes, then as float32 rows. A product over n needs lanes that run over k; four bytes of
// a lane belong to one row already, so what is turned are dwords, 16 shuffles for 512 codes.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int BLOCK_ROWS = 16, CHUNK_COLUMNS = 32, HALF = 16;
constexpr int64_t AHEAD = 8;  // blocks from prefetch to use
constexpr int TURNED_BYTES = BLOCK_ROWS * CHUNK_COLUMNS;

typedef uint8_t vbytes __attribute__((vector_size(VEC_BYTES)));

// Where the 16 codes of a row in one half (16 columns) of a turned chunk begin.
FLCORE_INLINE int turned_at(int half, int row) {
  return half * (HALF * BLOCK_ROWS) + row % 4 * 64 + row / 4 * HALF;
}

FLCORE_INLINE int64_t group_count(const QWeight& w) { return (w.k + w.group - 1) / w.group; }
FLCORE_INLINE int64_t chunk_count(const QWeight& w) {
  return (w.k + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
}

// ---- scales -------------------------------------------------------------------------------------

// What belongs to the two halves of a chunk: one group, or two where its length is an odd multiple
// of 16.
struct ChunkScales {
  int64_t block, first, last;                    // of which block and groups; block -1: of none
  float scale[2][BLOCK_ROWS], zero[2][BLOCK_ROWS];
  alignas(64) uint8_t offset[TURNED_BYTES];      // taken from the codes, ordered as turned ones
};

FLCORE_INLINE void load_16(const void* p, int dtype, int64_t at, float* to) {
  for (int i = 0; i < BLOCK_ROWS; i += LANES)
    store(to + i, dtype == F32   ? load_f32<F32>(p, at + i)
                  : dtype == F16 ? load_f32<F16>(p, at + i)
                                 : load_f32<BF16>(p, at + i));
}

// The codes of a chunk. Blocks lie pages apart, where no processor sees what comes next: what is
// needed AHEAD blocks later is asked for. (Addresses behind the end do no harm.)
FLCORE_INLINE const uint8_t* chunk_codes(const QWeight& w, int64_t block, int64_t chunk) {
  const int64_t bytes = 64 * w.bits, row = chunk_count(w) * bytes;
  const uint8_t* at = w.codes + block * row + chunk * bytes;
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(at) + uintptr_t(AHEAD * row + i)));
  return at;
}

// What is taken from the codes of the chunk at `column`, so that they become signed bytes: Z where
// that fits, 2^(b - 1) else. False when it was there already.
static bool load_offsets(const QWeight& w, int64_t block, int64_t column, ChunkScales& s) {
  const int64_t groups = group_count(w), second = (column + HALF) / w.group;
  const int64_t group[2] = {column / w.group, second < groups - 1 ? second : groups - 1};
  const bool same_groups = s.first == group[0] && s.last == group[1], was_set = s.block >= 0;
  if (s.block == block && same_groups) return false;
  s.block = block;
  s.first = group[0];
  s.last = group[1];
  const bool whole = w.kind == QW_INT && w.bits < 8;
  const uint8_t* z = whole ? static_cast<const uint8_t*>(w.zeros) : nullptr;
  if (!z && was_set) return true;
  const uint8_t middle = w.kind >= QW_TABLE ? 0 : uint8_t(1 << (w.bits - 1));
  for (int half = 0; half < 2; ++half)
    for (int r = 0; r < BLOCK_ROWS; ++r) {
      const uint8_t off = z ? z[(block * groups + group[half]) * BLOCK_ROWS + r] : middle;
      __builtin_memset(s.offset + turned_at(half, r), off, HALF);
    }
  return true;
}

// The same and the scales; `zero` is what remains of Z, or the zero that is added.
static void load_scales(const QWeight& w, int64_t block, int64_t column, ChunkScales& s) {
  if (!load_offsets(w, block, column, s)) return;
  for (int half = 0; half < 2; ++half) {
    const int64_t group = half ? s.last : s.first;
    const int64_t at = (block * group_count(w) + group) * BLOCK_ROWS;
    load_16(w.scales, w.scale_dtype, at, s.scale[half]);
    if (w.kind == QW_FLOAT_ZERO) load_16(w.zeros, w.scale_dtype, at, s.zero[half]);
    if (w.kind == QW_INT && w.bits == 8 && w.zeros)
      for (int r = 0; r < BLOCK_ROWS; ++r)
        s.zero[half][r] = float(int(static_cast<const uint8_t*>(w.zeros)[at + r]) - 128);
  }
}

// ---- codes --------------------------------------------------------------------------------------

// to[turned_at(half, row) + column of the half] = code less its offset
template <int B>
FLCORE_INLINE void turn_chunk(const uint8_t* chunk, const uint8_t* offset, uint8_t* to) {
  for (int part = 0; part < 64; part += VEC_BYTES) {
    vu32 x[8];  // dword lane: a row; its bytes: columns 4 u .. 4 u + 3
    if constexpr (B == 8) {
      for (int u = 0; u < 8; ++u) x[u] = load<vu32>(chunk + 64 * u + part);
    } else if constexpr (B == 4) {
      for (int v = 0; v < 4; ++v) {
        const vu32 both = load<vu32>(chunk + 64 * v + part);
        x[2 * v] = both & 0x0f0f0f0fu;
        x[2 * v + 1] = (both >> 4) & 0x0f0f0f0fu;
      }
    } else {
      for (int v = 0; v < 2; ++v) {
        const vu32 four = load<vu32>(chunk + 64 * v + part);
        for (int t = 0; t < 4; ++t) x[4 * v + t] = (four >> (2 * t)) & 0x03030303u;
      }
      if constexpr (B == 3) {
        const vu32 high = load<vu32>(chunk + 128 + part);
        for (int u = 0; u < 8; ++u)
          x[u] |= (u < 3 ? high << (2 - u) : high >> (u - 2)) & 0x04040404u;
      }
    }
    for (int half = 0; half < 2; ++half) {
      vf32 q[4];
      for (int j = 0; j < 4; ++j) q[j] = (vf32)x[4 * half + j];
      turn(q);
      for (int j = 0; j < 4; ++j) {
        const int at = half * (HALF * BLOCK_ROWS) + j * 64 + part;
        store(to + at, (vbytes)q[j] - load<vbytes>(offset + at));
      }
    }
  }
}

static void turn_chunk(int bits, const uint8_t* chunk, const uint8_t* offset, uint8_t* to) {
  switch (bits) {
    case 2: return turn_chunk<2>(chunk, offset, to);
    case 3: return turn_chunk<3>(chunk, offset, to);
    case 4: return turn_chunk<4>(chunk, offset, to);
    default: return turn_chunk<8>(chunk, offset, to);
  }
}

// ---- rows of float32 ----------------------------------------------------------------------------

FLCORE_INLINE vf32 splat(float x) {
#if defined(__AVX512F__)
  return (vf32)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf32)_mm256_set1_ps(x);
#elif defined(__x86_64__)
  return (vf32)_mm_set1_ps(x);
#else
  return vf32{} + x;
#endif
}

// a b + c, fused where the processor can
FLCORE_INLINE vf32 multiply_add(const vf32& a, const vf32& b, const vf32& c) {
#if defined(__AVX512F__)
  return (vf32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

FLCORE_INLINE vf32 signed_bytes(const uint8_t* at) {
#if defined(__SSE4_1__) && !defined(__AVX2__)
  int32_t four;
  __builtin_memcpy(&four, at, 4);
  return (vf32)_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four)));
#else
  return load_f32<I8>(at, 0);
#endif
}

// table[code] of LANES codes below 16
FLCORE_INLINE vf32 levels(const uint8_t* at, const float* table) {
#if defined(__AVX512F__)
  const __m512i code = _mm512_maskz_cvtepu8_epi32(__mmask16(0xffff), load<__m128i>(at));
  return (vf32)_mm512_maskz_permutexvar_ps(__mmask16(0xffff), code, load<__m512>(table));
#elif defined(__AVX2__)
  const __m256i code =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  const __m256 low = _mm256_permutevar8x32_ps(load<__m256>(table), code);
  const __m256 high = _mm256_permutevar8x32_ps(load<__m256>(table + 8), code);
  return (vf32)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
#else
  vf32 v;
  for (int i = 0; i < LANES; ++i) v[i] = table[at[i]];
  return v;
#endif
}

// Finite numbers of 8 bits: moved to their place in a float16, whose exponents reach 2^8 times as
// far down as those of e4m3.
template <int KIND>
FLCORE_INLINE vf32 minifloats(const uint8_t* at) {
  const float unit = KIND == QW_E4M3 ? 256.0f : 1.0f;
#if defined(__AVX512F__)
  const __m256i q = _mm256_cvtepu8_epi16(load<__m128i>(at));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(q, _mm256_set1_epi16(0x80)), 8);
  const __m256i body = _mm256_slli_epi16(_mm256_and_si256(q, _mm256_set1_epi16(0x7f)), 7);
  const __m256i h = KIND == QW_E4M3 ? _mm256_or_si256(sign, body) : _mm256_slli_epi16(q, 8);
  return (vf32)_mm512_maskz_cvtph_ps(__mmask16(0xffff), h) * unit;
#elif defined(__AVX2__)
  const __m128i q = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(q, _mm_set1_epi16(0x80)), 8);
  const __m128i body = _mm_slli_epi16(_mm_and_si128(q, _mm_set1_epi16(0x7f)), 7);
  const __m128i h = KIND == QW_E4M3 ? _mm_or_si128(sign, body) : _mm_slli_epi16(q, 8);
  return (vf32)_mm256_cvtph_ps(h) * unit;
#else
  vf32 v;
  for (int i = 0; i < LANES; ++i) {
    const int q = at[i];
    const int h = KIND == QW_E4M3 ? (q & 0x80) << 8 | (q & 0x7f) << 7 : q << 8;
    v[i] = f16_to_f32(uint16_t(h)) * unit;
  }
  return v;
#endif
}

// LANES weights of a row, each rounded to float32 once (INT: the product is the one rounding)
template <int KIND, bool SHIFTED>
FLCORE_INLINE vf32 weights(const uint8_t* at, const float* table, const vf32& scale,
                           const vf32& zero) {
  if constexpr (KIND == QW_TABLE) return levels(at, table) * scale;
  if constexpr (KIND == QW_E4M3 || KIND == QW_E5M2) return minifloats<KIND>(at) * scale;
  if constexpr (KIND == QW_FLOAT_ZERO) {
#if defined(__AVX2__)
    return multiply_add(signed_bytes(at), scale, zero);
#else
    return vfma(signed_bytes(at), scale, zero);
#endif
  }
  if constexpr (SHIFTED) return (signed_bytes(at) - zero) * scale;
  return signed_bytes(at) * scale;
}

// The 16 rows of a turned chunk as float32: panel[row * 32 + column]
template <int KIND, bool SHIFTED>
FLCORE_INLINE void weight_rows(const uint8_t* turned, const ChunkScales& s, const float* table,
                               float* panel) {
  for (int half = 0; half < 2; ++half)
    for (int r = 0; r < BLOCK_ROWS; ++r) {
      const vf32 scale = splat(s.scale[half][r]), zero = splat(s.zero[half][r]);
      const uint8_t* at = turned + turned_at(half, r);
      for (int i = 0; i < HALF; i += LANES)
        store(panel + r * CHUNK_COLUMNS + half * HALF + i,
              weights<KIND, SHIFTED>(at + i, table, scale, zero));
    }
}

static void weight_rows(const QWeight& w, const uint8_t* turned, const ChunkScales& s,
                        float* panel) {
  switch (w.kind) {
    case QW_FLOAT_ZERO: return weight_rows<QW_FLOAT_ZERO, false>(turned, s, w.table, panel);
    case QW_TABLE: return weight_rows<QW_TABLE, false>(turned, s, w.table, panel);
    case QW_E4M3: return weight_rows<QW_E4M3, false>(turned, s, w.table, panel);
    case QW_E5M2: return weight_rows<QW_E5M2, false>(turned, s, w.table, panel);
    default:
      if (w.zeros && w.bits == 8) return weight_rows<QW_INT, true>(turned, s, w.table, panel);
      return weight_rows<QW_INT, false>(turned, s, w.table, panel);
  }
}

// Chunk `c` of block `block` as float32 rows
FLCORE_INLINE void decode_chunk(const QWeight& w, int64_t block, int64_t c, ChunkScales& s,
                                float* panel) {
  alignas(64) uint8_t turned[TURNED_BYTES];
  load_scales(w, block, c * CHUNK_COLUMNS, s);
  turn_chunk(w.bits, chunk_codes(w, block, c), s.offset, turned);
  weight_rows(w, turned, s, panel);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
