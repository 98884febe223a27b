// Arguments of the counter RNG as Python hands them over, for flcore._core and flcore._cuda.
#pragma once

#include <cstdint>

#include "api.h"
#include "check.h"

namespace flcore {

inline RngArgs random_args(uintptr_t out, int64_t numel, uint64_t seed, uint32_t round,
                           uint32_t tensor, uint32_t client, int64_t offset, int threads) {
  FLCORE_CHECK(numel >= 0 && offset >= 0 && offset <= PHILOX_LENGTH - numel,
               "offset + numel: expected at most 2^34, got ", offset, " + ", numel);
  return RngArgs{philox_stream(seed, round, tensor, client), offset, numel,
                 reinterpret_cast<void*>(out), threads};
}

}  // namespace flcore
