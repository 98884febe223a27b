// The k coordinates that a count sketch says are largest (csrc/sketch.cpp).
#pragma once

#include <cstdint>

#include "api.h"

namespace flcore {

// Larger |estimate| first, then smaller index; written in the order of the indices. 0 <= k <= numel.
void sketch_top_k(const SketchTable& table, int64_t k, int64_t* index, float* values);

}  // namespace flcore
