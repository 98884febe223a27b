// Layers of a vector that is held in pieces.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace flcore {
namespace FLCORE_ISA {

// Last layer that starts at or before a coordinate; starts[layers] is the total length.
FLCORE_INLINE int64_t find_layer(const int64_t* starts, int64_t layers, int64_t coordinate) {
  int64_t low = 0, high = layers - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (starts[middle] <= coordinate)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
