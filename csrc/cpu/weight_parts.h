// The parts of a weight in either layout, 16 rows at a time through a buffer of bytes.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"
#include "cpu/weight_pack.h"
#include "cpu/weight_rules.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

int64_t groups_of(const WeightQuantArgs& a) { return (a.k + a.group - 1) / a.group; }
int64_t blocks_of(const WeightQuantArgs& a) { return (a.n + BLOCK_ROWS - 1) / BLOCK_ROWS; }
int64_t row_values(int64_t k) { return (k + ERROR_LANES - 1) / ERROR_LANES * ERROR_LANES; }

// ---- working memory --------------------------------------------------------------------------

struct Workspace {
  uint8_t* codes;  // [16][code_stride]
  uint8_t* plane;  // [k] and whole vectors
  float* row;      // [k], the same
};

int64_t thread_bytes(const WeightQuantArgs& a) {
  return BLOCK_ROWS * code_stride(a.k) + whole_lines(a.k + 64) + whole_lines(4 * row_values(a.k));
}
int64_t range_bytes(const WeightQuantArgs& a) {
  return a.tensor ? whole_lines(a.n * int64_t(sizeof(Range) + 2 * sizeof(float))) : 0;
}
int64_t scratch_bytes(const WeightQuantArgs& a) {
  return a.threads * thread_bytes(a) + range_bytes(a);
}

Workspace workspace(const WeightQuantArgs& a, int64_t thread) {
  uint8_t* codes = static_cast<uint8_t*>(a.scratch) + thread * thread_bytes(a);
  uint8_t* plane = codes + BLOCK_ROWS * code_stride(a.k);
  return {codes, plane, reinterpret_cast<float*>(plane + whole_lines(a.k + 64))};
}

// body(workspace, block): blocks of 16 rows, each thread a contiguous range
template <class Body>
void for_blocks(const WeightQuantArgs& a, const Body& body) {
  for_ranges(blocks_of(a), a.threads, [&](int64_t thread, int64_t first, int64_t end) {
    const Workspace w = workspace(a, thread);
    for (int64_t b = first; b < end; ++b) body(w, b);
  });
}

int64_t rows_in(const WeightQuantArgs& a, int64_t block) {
  const int64_t rest = a.n - block * BLOCK_ROWS;
  return rest < BLOCK_ROWS ? rest : BLOCK_ROWS;
}

// ---- parts in either layout ------------------------------------------------------------------

int64_t number_index(const WeightQuantArgs& a, int layout, int64_t row, int64_t g) {
  const int64_t groups = groups_of(a);
  if (layout == WEIGHT_ROWS) return row * groups + g;
  return (row / BLOCK_ROWS * groups + g) * BLOCK_ROWS + row % BLOCK_ROWS;
}

void write_codes(const WeightQuantArgs& a, const WeightParts& to, const Workspace& w,
                 int64_t block) {
  const int64_t stride = code_stride(a.k), rows = rows_in(a, block);
  if (to.layout == WEIGHT_ROWS) {
    const int64_t bytes = row_bytes(a.k, a.bits);
    for (int64_t r = 0; r < rows; ++r)
      pack_row(a.bits, w.codes + r * stride, a.k, to.codes + (block * BLOCK_ROWS + r) * bytes,
               w.plane);
    return;
  }
  const int pad = a.kind == QW_E4M3 || a.kind == QW_E5M2 ? 0 : 1 << (a.bits - 1);
  const int64_t chunks = chunks_of(a.k), whole = chunks * CHUNK_K;
  for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
    const int64_t real = r < rows ? a.k : 0;
    __builtin_memset(w.codes + r * stride + real, pad, size_t(whole - real));
  }
  pack_tiles(a.bits, w.codes, stride, a.k, to.codes + block * chunks * 64 * a.bits);
}

void read_codes(const WeightQuantArgs& a, const Workspace& w, int64_t block) {
  const int64_t stride = code_stride(a.k), rows = rows_in(a, block);
  if (a.parts.layout == WEIGHT_ROWS) {
    const int64_t bytes = row_bytes(a.k, a.bits);
    for (int64_t r = 0; r < rows; ++r)
      unpack_row(a.bits, a.parts.codes + (block * BLOCK_ROWS + r) * bytes, a.k,
                 w.codes + r * stride, w.plane);
    return;
  }
  unpack_tiles(a.bits, a.parts.codes + block * chunks_of(a.k) * 64 * a.bits, stride, a.k, w.codes);
}

// Scales and zeros of rows that only pad a block.
void pad_numbers(const WeightQuantArgs& a, const WeightParts& to, int64_t block) {
  if (to.layout == WEIGHT_ROWS) return;
  for (int64_t r = rows_in(a, block); r < BLOCK_ROWS; ++r) {
    for (int64_t g = 0; g < groups_of(a); ++g) {
      const int64_t i = number_index(a, to.layout, block * BLOCK_ROWS + r, g);
      store1(a.scale_dtype, to.scales, i, 0.0f);
      if (!to.zeros) continue;
      if (a.kind == QW_INT)
        static_cast<uint8_t*>(to.zeros)[i] = 0;
      else
        store1(a.scale_dtype, to.zeros, i, 0.0f);
    }
  }
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
