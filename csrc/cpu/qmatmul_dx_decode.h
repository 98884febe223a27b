// A chunk of a packed weight (layout tile16: 16 rows n, 32 columns k) with columns side by side,
// first as codes, then as float32 rows. A product over n needs lanes that run over k; four bytes of
// a lane belong to one row already, so what is turned are dwords, 16 shuffles for 512 codes.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/fma.h"
#include "cpu/fp8.h"
#include "cpu/int_lanes.h"
#include "cpu/isa.h"
#include "cpu/qweight.h"
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

// ---- scales -------------------------------------------------------------------------------------

// What belongs to the two halves of a chunk: one group, or two where its length is an odd multiple
// of 16.
struct ChunkScales {
  int64_t block, first, last;                    // of which block and groups; block -1: of none
  float scale[2][BLOCK_ROWS], zero[2][BLOCK_ROWS];
  alignas(64) uint8_t offset[TURNED_BYTES];      // taken from the codes, ordered as turned ones
};

FLCORE_INLINE void load_16(const void* p, int dtype, int64_t at, float* to) {
  for (int i = 0; i < BLOCK_ROWS; i += LANES) store(to + i, load_f32(dtype, p, at + i));
}

// The codes of a chunk. Blocks lie pages apart, where no processor sees what comes next: what is
// needed AHEAD blocks later is asked for. (Addresses behind the end do no harm.)
FLCORE_INLINE const uint8_t* chunk_codes(const QWeight& w, int64_t block, int64_t chunk) {
  const int64_t bytes = 64 * w.bits, row = block_bytes(w);
  const uint8_t* at = block_codes(w, block) + chunk * bytes;
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

// LANES weights of a row, each rounded to float32 once (INT: the product is the one rounding)
template <int KIND, bool SHIFTED>
FLCORE_INLINE vf32 weights(const uint8_t* at, const float* table, const vf32& scale,
                           const vf32& zero) {
  if constexpr (KIND == QW_TABLE) return look_up(table, at) * scale;
  if constexpr (KIND == QW_E4M3 || KIND == QW_E5M2)
    return fp8_values(load_u8(at), fp8_of(KIND)) * scale;
  const vf32 q = load_f32<I8>(at, 0);
  if constexpr (KIND == QW_FLOAT_ZERO) return vfma(q, scale, zero);
  return (SHIFTED ? q - zero : q) * scale;
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
