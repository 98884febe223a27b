// What a count sketch says about coordinates: for each the median over the rows of sign * cell.
//   word = element j of stream (seed, 0, STREAM_SKETCH, row);  sign: bit 0, 1 = minus
//   column = (word >> 1) * columns >> 31
// Words are computed, not stored: 10 rounds of Philox for four of them. Medians by a sorting network,
// a lane a coordinate; a zero estimate is +0.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/network.h"
#include "cpu/philox_bits.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t SKETCH_BLOCK = 1024;  // coordinates whose words and estimates wait in L1

FLCORE_INLINE PhiloxStream sketch_stream(uint64_t seed, int64_t row) {
  return {uint32_t(seed), uint32_t(seed >> 32), STREAM_SKETCH, 0, uint32_t(row)};
}

FLCORE_INLINE uint32_t sketch_column(uint32_t word, uint64_t columns) {
  return uint32_t((uint64_t(word >> 1) * columns) >> 31);
}

// Columns and signs (0 or the sign bit) of coordinates [begin, begin + count), at most SKETCH_BLOCK.
static void sketch_places(const SketchHash& h, int64_t row, int64_t begin, int64_t count,
                          uint32_t* columns, uint32_t* signs) {
  philox_fill<PhiloxRaw>(sketch_stream(h.seed, row), begin, count, columns);
  const uint64_t width = uint64_t(h.columns);
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t word = columns[j];
    signs[j] = word << 31;
    columns[j] = sketch_column(word, width);
  }
}

template <int ROWS>
static void sketch_medians(const float* estimates, int64_t count, float* out) {
  using Net = SortNetwork<ROWS, ROWS / 2, ROWS / 2>;
  constexpr int MIDDLE = Net::net.order.at[ROWS / 2];
  for (int64_t j = 0; j < count; j += LANES) {
    vf32 rows[ROWS];
    for (int i = 0; i < ROWS; ++i) rows[i] = load<vf32>(estimates + i * SKETCH_BLOCK + j);
    run_network<Net>(rows);
    const vf32 median = rows[MIDDLE] + 0.0f;
    if (j + LANES <= count) {
      store(out + j, median);
    } else {
      for (int64_t k = j; k < count; ++k) store(out + k, median[int(k - j)]);
    }
  }
}

// Estimates of coordinates [begin, begin + count), at most SKETCH_BLOCK; cells and out: any alignment
static void sketch_estimates(const SketchHash& h, const void* cells, int64_t begin, int64_t count,
                             float* out) {
  float estimates[SKETCH_ROWS * SKETCH_BLOCK];
  uint32_t columns[SKETCH_BLOCK], signs[SKETCH_BLOCK];
  for (int64_t i = 0; i < h.rows; ++i) {
    sketch_places(h, i, begin, count, columns, signs);
    const char* row = static_cast<const char*>(cells) + 4 * i * h.columns;
    float* to = estimates + i * SKETCH_BLOCK;
    for (int64_t j = 0; j < count; ++j)
      to[j] = float_of(load<uint32_t>(row + 4 * int64_t(columns[j])) ^ signs[j]);
    for (int64_t j = count; j % LANES; ++j) to[j] = 0;
  }
  if (h.rows == 1) sketch_medians<1>(estimates, count, out);
  if (h.rows == 3) sketch_medians<3>(estimates, count, out);
  if (h.rows == 5) sketch_medians<5>(estimates, count, out);
  if (h.rows == 7) sketch_medians<7>(estimates, count, out);
  if (h.rows == 9) sketch_medians<9>(estimates, count, out);
}

// out[i] = D[begin + i], 0 <= i < count
static inline void dequantize_sketch(const PacketView& v, int64_t begin, int64_t count,
                                     float* out) {
  const SketchHash hash{v.seed, v.form, v.bucket};
  for (int64_t i = 0; i < count; i += SKETCH_BLOCK)
    sketch_estimates(hash, v.values, begin + i,
                     count - i < SKETCH_BLOCK ? count - i : SKETCH_BLOCK, out + i);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
