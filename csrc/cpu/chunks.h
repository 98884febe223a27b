// The only place with an OpenMP pragma. Work is cut into chunks of a fixed size by the caller, so
// that neither the number of threads nor the instruction set changes a result.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace flcore {
namespace FLCORE_ISA {

// body(i) for i in [0, count), each thread a contiguous range; body must not throw.
template <class Body>
static void for_chunks(int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#endif
  (void)threads;
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
