// Rows of P Q^T, for the encoder's own error and for decoders.
//   out[j] = ((P[0] Q[0][j] + P[1] Q[1][j]) + ..): float32, in this order, no fma
// Factors lie as in a packet: a row of P is `rank` values, Q^T holds `rank` rows of m values, in
// float32 or bfloat16. Bandwidth: 4 bytes written a value for rank * 4 read from L1 or L2.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// Columns [from, from + count) of the row whose factor is p [rank]; q: element 0 of Q^T.
template <int D>
static void low_rank_row(const float* p, const void* q, int64_t m, int64_t rank, int64_t from,
                         int64_t count, float* out) {
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) {
    vf32 sum = p[0] * load_f32<D>(q, from + j);
    for (int64_t k = 1; k < rank; ++k) sum = sum + p[k] * load_f32<D>(q, k * m + from + j);
    store(out + j, sum);
  }
  for (; j < count; ++j) {
    float sum = p[0] * load1<D>(q, from + j);
    for (int64_t k = 1; k < rank; ++k) sum = sum + p[k] * load1<D>(q, k * m + from + j);
    store(out + j, sum);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
