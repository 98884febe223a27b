// Working memory that a caller allocates for each thread and a kernel divides up.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace flcore {
namespace FLCORE_ISA {

// Bytes of a part, rounded up so that the next one begins on a cache line.
FLCORE_INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace FLCORE_ISA
}  // namespace flcore
