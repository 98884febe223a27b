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

// body(thread, first, end): [0, count) as one contiguous range a thread, which may be empty; for
// work that takes up where the one before left off, or memory that each thread has once.
template <class Body>
static void for_ranges(int64_t count, int threads, const Body& body) {
  for_chunks(threads, threads, [&](int64_t thread) {
    body(thread, count * thread / threads, count * (thread + 1) / threads);
  });
}

}  // namespace FLCORE_ISA
}  // namespace flcore
