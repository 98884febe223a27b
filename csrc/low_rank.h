// One message of PowerSGD: from gradient layers to the factors of a packet, or to one factor of the
// form whose messages are summed before they are decoded (csrc/low_rank.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "api.h"

namespace flcore {

// Values that D = P Q^T may reach, and a little room for rounding: it never overflows.
constexpr double LOW_RANK_LARGEST = 3.4e38;

// What each layer is, and where its parts lie among factors and values.
class LowRankPlan {
 public:
  // A layer of rank 0 is sent as its values. Checks that n m is the layer's number of values.
  LowRankPlan(const std::vector<int64_t>& numel, const std::vector<int64_t>& n,
              const std::vector<int64_t>& m, const std::vector<int64_t>& rank);
  LowRankArgs args(const FeedbackArgs& feedback) const;

  std::vector<LowRankLayer> layers;
  int64_t numel = 0;
  int64_t p = 0, q = 0, values = 0;           // elements
  int64_t column_sums = 0, row_sums = 0;      // partial sums of the two products
  std::vector<int64_t> first_tile, first_column, first_row_sum;
};

// Factors and values of a packet; sections in the packet's order and value dtype.
struct LowRankPacket {
  const float* start;  // [plan.q] Q^T to begin with, not orthonormal
  float* next;         // [plan.q] receives the Q^T that was sent, for the next call
  int value_dtype;     // F32 or BF16
  uint8_t *p, *q, *values;
};

// Returns false, with the state unchanged, when a value is not finite or the result would not be.
bool low_rank(const FeedbackArgs& feedback, const LowRankPlan& plan, const LowRankPacket& packet);

// One factor: P = U Q [plan.p] or, `back`, Q^T = (U^T P)^T [plan.q], in float32, and the values; e <- t
// where a factor is sent. Needs a spare for e. Returns false as above.
bool low_rank_half(const FeedbackArgs& feedback, const LowRankPlan& plan, bool back,
                   const float* factor, float* product, float* values);

// e_new = e - P Q^T where a layer has factors.
void low_rank_residual(const LowRankPlan& plan, const float* p, const float* q, const float* e,
                       float* e_new, int threads);

// Orthonormal columns of P, or rows of Q^T, one layer after the other.
void low_rank_orthonormalise(const LowRankPlan& plan, bool columns, const float* in, float* out,
                             int threads);

}  // namespace flcore
