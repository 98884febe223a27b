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

// `types`: the first dtype code that the caller's kernel cannot read.
inline void check_table(const Addresses& rows, int64_t n, const std::vector<int64_t>& numel,
                        const std::vector<int>& dtype, int types = DTYPE_COUNT) {
  FLCORE_CHECK(dtype.size() == numel.size(), "dtype: expected ", numel.size(), " codes, got ",
               dtype.size());
  FLCORE_CHECK(int64_t(rows.size()) == n * int64_t(numel.size()), "rows: expected ", n, " x ",
               numel.size(), " addresses, got ", rows.size());
  for (int d : dtype) FLCORE_CHECK(d >= 0 && d < types, "dtype: unknown code ", d);
}

// The addresses of one buffer a layer, or none at all.
inline std::vector<void*> layer_pointers(const char* name, const Addresses& a, size_t layers) {
  FLCORE_CHECK(a.empty() || a.size() == layers, name, ": expected one address a layer, got ",
               a.size(), " for ", layers, " layers");
  return pointers<>(a);
}
inline void* const* data_or_null(const std::vector<void*>& p) {
  return p.empty() ? nullptr : p.data();
}

// Packets in the place of rows; without any, rows are read. packet_call.h makes one.
struct PacketTable {
  std::vector<PacketView> views;
  std::vector<int64_t> starts;  // first coordinate of each layer, then the total

  int64_t count() const { return int64_t(views.size()); }
  const PacketView* data() const { return views.empty() ? nullptr : views.data(); }
};

// Owns the pointer arrays that `args` points into; the other vectors belong to the caller.
struct CombineCall {
  std::vector<const void*> rows;
  std::vector<void*> state, out;
  std::vector<int64_t> first_tile;
  CombineArgs args;

  // A weighted sum of floating rows into `o` or `s`.
  CombineCall(const Addresses& x, const std::vector<double>& weights,
              const std::vector<int64_t>& numel, const std::vector<int>& dtype, const Addresses& s,
              const Addresses& o, int accumulate, double divisor, int threads, bool check = true)
      : CombineCall(int64_t(weights.size()), x, weights, false, numel, dtype, {}, s, o, accumulate,
                    divisor, threads, check) {
    FLCORE_CHECK(numel.empty() || !s.empty() || !o.empty(), "state or out is needed");
  }

  // The general form: rows of int8 when out_dtype has a code for each layer, a weight for each row or
  // for each layer of each row, or packets, which belong to the caller.
  CombineCall(int64_t n, const Addresses& x, const std::vector<double>& weights, bool by_layer,
              const std::vector<int64_t>& numel, const std::vector<int>& dtype,
              const std::vector<int>& out_dtype, const Addresses& s, const Addresses& o,
              int accumulate, double divisor, int threads, bool check,
              const PacketTable& packets = {})
      : rows(pointers<const void>(x)), state(layer_pointers("state", s, numel.size())),
        out(layer_pointers("out", o, numel.size())), first_tile(numel.size() + 1) {
    FLCORE_CHECK(packets.views.empty() || packets.count() == n, "packets: expected ", n, ", got ",
                 packets.count());
    check_table(x, packets.views.empty() ? n : 0, numel, dtype,
                out_dtype.empty() ? DTYPE_COUNT : ROW_DTYPE_COUNT);
    const size_t count = size_t(n) * (by_layer ? numel.size() : 1);
    FLCORE_CHECK(weights.size() == count, "weights: expected ", count, ", got ", weights.size());
    FLCORE_CHECK(out_dtype.empty() || out_dtype.size() == numel.size(), "out_dtype: expected ",
                 numel.size(), " codes, got ", out_dtype.size());
    for (int d : out_dtype) FLCORE_CHECK(d >= 0 && d < DTYPE_COUNT, "out_dtype: unknown code ", d);
    FLCORE_CHECK(accumulate >= 0 && accumulate < ACCUMULATE_COUNT, "accumulate: unknown code");
    args = {n,
            int64_t(numel.size()),
            numel.data(),
            dtype.data(),
            rows.data(),
            weights.data(),
            data_or_null(state),
            data_or_null(out),
            accumulate,
            divisor,
            threads,
            check,
            first_tile.data(),
            out_dtype.empty() ? nullptr : out_dtype.data(),
            by_layer,
            packets.data(),
            packets.starts.data(),
            nullptr};
  }
  CombineCall(const CombineCall&) = delete;
  CombineCall& operator=(const CombineCall&) = delete;
};

}  // namespace flcore
