// Rules of low-rank packets: for each tensor of the table a rank, and then its factors P and Q^T or,
// at rank 0, its values.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "low_rank.h"
#include "wire_rules.h"

namespace flcore {
namespace wire {
namespace {

#define NEED FLCORE_NEED

void check_header(const Header& h) {
  NEED(h.value_dtype == F32 || h.value_dtype == BF16,
       "value dtype: expected 1 (float32) or 3 (bfloat16), got ", int(h.value_dtype));
  NEED(h.index == 0, "form ", int(h.index), " is not one that low_rank packets have");
  const int64_t bits = 8 * value_bytes(h.value_dtype);
  NEED(h.bits == bits, "expected ", bits, " bits a value, got ", int(h.bits));
  NEED(h.tile >= 1 && h.tile <= uint32_t(LOW_RANK_MAX), "expected a rank of 1 to ", LOW_RANK_MAX,
       ", got ", h.tile);
}

int64_t element_bytes(uint16_t type, const Header& h) {
  if (type == COUNTS) return 4;
  return type == VALUES || type == FACTOR_P || type == FACTOR_Q ? value_bytes(h.value_dtype) : 0;
}

// What the factors hold depends on the ranks and so on bytes that nobody has checked yet: here their
// sections only have to be there. The bound on the payload holds for them too.
void check_lengths(Packet& packet) {
  const int64_t tensors = packet.frame.length(TENSORS) / TENSOR_BYTES;
  NEED(packet.header.numel == 0 || tensors > 0, "section type 9 (tensor table) is missing");
  const Section& ranks = need_section(packet, COUNTS, "ranks");
  NEED(ranks.length == 4 * tensors, "section type 3: expected ", 4 * tensors, " bytes for ",
       tensors, " tensors, got ", ranks.length);
  packet.k = 0;
  for (const auto& [type, what] : {std::pair<uint16_t, const char*>{VALUES, "values"},
                                   {FACTOR_P, "P"}, {FACTOR_Q, "Q"}})
    packet.k += need_section(packet, type, what).length / value_bytes(packet.header.value_dtype);
}

float number_at(const uint8_t* p, int64_t i, int dtype) {
  const uint32_t bits =
      dtype == F32 ? get<uint32_t>(p + 4 * i) : uint32_t(get<uint16_t>(p + 2 * i)) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The largest |D| that a layer's factors can give, in float64.
double reach(const Packet& packet, const LowRankLayer& l) {
  const uint8_t *p = packet.section(FACTOR_P), *q = packet.section(FACTOR_Q);
  const int dtype = packet.header.value_dtype;
  double sum = 0;
  for (int64_t k = 0; k < l.rank; ++k) {
    float rows = 0, columns = 0;
    for (int64_t i = 0; i < l.n; ++i)
      rows = std::max(rows, std::fabs(number_at(p, l.p + i * l.rank + k, dtype)));
    for (int64_t j = 0; j < l.m; ++j)
      columns = std::max(columns, std::fabs(number_at(q, l.q + k * l.m + j, dtype)));
    sum += double(rows) * double(columns);
  }
  return sum;
}

void check_contents(Packet& packet) {
  const Header& h = packet.header;
  const uint8_t *table = packet.section(TENSORS), *ranks = packet.section(COUNTS);
  const int64_t tensors = packet.frame.length(TENSORS) / TENSOR_BYTES;
  int64_t p = 0, q = 0, values = 0;
  packet.matrices.reserve(size_t(tensors));
  for (int64_t i = 0; i < tensors; ++i) {
    const uint8_t* row = table + TENSOR_BYTES * i;  // checked: count = product of the dimensions
    const int64_t start = int64_t(get<uint64_t>(row + 8)), count = int64_t(get<uint64_t>(row + 16));
    const int64_t rank = get<uint32_t>(ranks + 4 * i);
    LowRankLayer l{start, 1, count, rank, p, q, values};
    if (rank > 0) {
      NEED(row[24] >= 2 && count > 0, "tensor ", i, ": of rank ", rank,
           " but without two dimensions of values");
      l.n = get<uint32_t>(row + 32);
      l.m = count / l.n;
      NEED(rank <= h.tile && rank <= std::min(l.n, l.m), "tensor ", i, ": rank ", rank,
           " exceeds ", std::min<int64_t>(h.tile, std::min(l.n, l.m)));
    }
    packet.matrices.push_back(l);
    p += l.rank * l.n;  // at most `count`, so that no sum can overflow
    q += l.rank * l.m;
    values += l.rank ? 0 : count;
  }
  const int64_t bytes = value_bytes(h.value_dtype);
  const struct {
    uint16_t type;
    int64_t want;
  } sections[] = {{VALUES, values}, {FACTOR_P, p}, {FACTOR_Q, q}};
  for (const auto& [type, want] : sections) {
    const int64_t got = packet.frame.length(type) / bytes;
    NEED(got == want, "section type ", type, ": expected ", want, " numbers for the ranks, got ",
         got);
    NEED(values_finite(packet.section(type), got, h.value_dtype), "section type ", type,
         ": a number is not finite");
  }
  for (size_t i = 0; i < packet.matrices.size(); ++i)
    NEED(reach(packet, packet.matrices[i]) <= LOW_RANK_LARGEST, "tensor ", i,
         ": the product of its factors may overflow");
}

}  // namespace

const Rules LOW_RANK_RULES = {"low_rank", &check_header, &element_bytes, &check_lengths,
                              &check_contents};

}  // namespace wire
}  // namespace flcore
