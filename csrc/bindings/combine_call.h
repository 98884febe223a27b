// Arguments of combine and nonfinite as Python hands them over, for flcore._core and flcore._cuda.
// Addresses arrive as integers; sizes are checked here, once for both modules.
#pragma once

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

namespace flcore {

using Addresses = std::vector<uintptr_t>;

inline void check_table(const Addresses& rows, int64_t n, const std::vector<int64_t>& numel,
                        const std::vector<int>& dtype) {
  FLCORE_CHECK(dtype.size() == numel.size(), "dtype: expected ", numel.size(), " codes, got ",
               dtype.size());
  FLCORE_CHECK(int64_t(rows.size()) == n * int64_t(numel.size()), "rows: expected ", n, " x ",
               numel.size(), " addresses, got ", rows.size());
  for (int d : dtype) FLCORE_CHECK(d >= 0 && d < DTYPE_COUNT, "dtype: unknown code ", d);
}

// Owns the pointer arrays that `args` points into; the other vectors belong to the caller.
struct CombineCall {
  std::vector<const void*> rows;
  std::vector<void*> state, out;
  std::vector<int64_t> first_tile;
  CombineArgs args;

  CombineCall(const Addresses& x, const std::vector<double>& weights,
              const std::vector<int64_t>& numel, const std::vector<int>& dtype, const Addresses& s,
              const Addresses& o, int accumulate, double divisor, int threads,
              bool check = true)
      : rows(pointers<const void>(x)), state(pointers<>(s)), out(pointers<>(o)),
        first_tile(numel.size() + 1) {
    const int64_t n = int64_t(weights.size());
    check_table(x, n, numel, dtype);
    FLCORE_CHECK(s.empty() || s.size() == numel.size(), "state: one address a layer");
    FLCORE_CHECK(o.empty() || o.size() == numel.size(), "out: one address a layer");
    FLCORE_CHECK(numel.empty() || !s.empty() || !o.empty(), "state or out is needed");
    FLCORE_CHECK(accumulate >= 0 && accumulate < ACCUMULATE_COUNT, "accumulate: unknown code");
    args = {n,
            int64_t(numel.size()),
            numel.data(),
            dtype.data(),
            rows.data(),
            weights.data(),
            s.empty() ? nullptr : state.data(),
            o.empty() ? nullptr : out.data(),
            accumulate,
            divisor,
            threads,
            check,
            first_tile.data()};
  }
  CombineCall(const CombineCall&) = delete;
  CombineCall& operator=(const CombineCall&) = delete;
};

}  // namespace flcore
