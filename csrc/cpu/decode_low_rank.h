// Coordinates of low-rank packets: values, or rows of P Q^T (cpu/low_rank_rows.h).
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/low_rank_rows.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

template <int D>
static void low_rank_part(const PacketView& v, const LowRankLayer& l, int64_t from, int64_t count,
                          float* out) {
  if (l.rank == 0) {
    int64_t i = 0;
    const int64_t at = l.values + from;
    for (; i + LANES <= count; i += LANES) store(out + i, load_f32<D>(v.values, at + i));
    for (; i < count; ++i) store(out + i, load1<D>(v.values, at + i));
    return;
  }
  const char* q = reinterpret_cast<const char*>(v.factor_q) + dtype_bytes(D) * l.q;
  for (int64_t done = 0; done < count;) {
    const int64_t row = (from + done) / l.m, column = (from + done) % l.m;
    const int64_t rest = l.m - column, part = rest < count - done ? rest : count - done;
    float p[LOW_RANK_MAX];
    for (int64_t k = 0; k < l.rank; ++k) p[k] = load1<D>(v.factor_p, l.p + row * l.rank + k);
    low_rank_row<D>(p, q, l.m, l.rank, column, part, out + done);
    done += part;
  }
}

// out[i] = D[begin + i], 0 <= i < count; out may have any alignment
static inline void dequantize_low_rank(const PacketView& v, int64_t begin, int64_t count, float* out) {
  int64_t low = 0, high = v.matrix_count - 1;  // the layer that holds `begin`
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (v.matrices[middle].start <= begin)
      low = middle;
    else
      high = middle - 1;
  }
  for (int64_t done = 0; done < count; ++low) {
    const LowRankLayer& l = v.matrices[low];
    const int64_t from = begin + done - l.start, rest = l.n * l.m - from;
    const int64_t part = rest < count - done ? rest : count - done;
    if (part <= 0) continue;  // an empty layer
    if (v.value_dtype == F32)
      low_rank_part<F32>(v, l, from, part, out + done);
    else
      low_rank_part<BF16>(v, l, from, part, out + done);
    done += part;
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
