// FeedbackArgs from the keyword arguments of flcore._state.State.native(), and what they point to.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

namespace flcore {

using Addresses = std::vector<uintptr_t>;

// First coordinate of each layer, then their total.
inline std::vector<int64_t> layer_starts(const std::vector<int64_t>& numel, const Addresses& layers,
                                         const std::vector<int>& dtype) {
  FLCORE_CHECK(layers.size() == numel.size() && dtype.size() == numel.size(),
               "layers: expected ", numel.size(), " addresses and dtypes, got ", layers.size(),
               " and ", dtype.size());
  std::vector<int64_t> starts(numel.size() + 1, 0);
  for (size_t i = 0; i < numel.size(); ++i) {
    FLCORE_CHECK(numel[i] >= 0 && starts[i] <= std::numeric_limits<int64_t>::max() - numel[i],
                 "numel[", i, "]: out of range: ", numel[i]);
    starts[i + 1] = starts[i] + numel[i];
  }
  return starts;
}

// Holds the vectors that FeedbackArgs points to; keep it alive during the call.
class FeedbackCall {
 public:
  FeedbackCall(const Addresses& layers, const std::vector<int64_t>& numel,
               const std::vector<int>& dtype, const pybind11::dict& state, uint64_t seed,
               uint64_t round, int threads)
      : starts_(layer_starts(numel, layers, dtype)),
        dtype_(dtype),
        grads_(pointers<const void>(layers)) {
    for (int d : dtype) FLCORE_CHECK(d >= 0 && d < DTYPE_COUNT, "dtype: unknown code ", d);
    const auto at = [&](const char* name) {
      return reinterpret_cast<void*>(state[name].cast<uintptr_t>());
    };
    args.numel = starts_.back();
    args.layers = int64_t(dtype_.size());
    args.starts = starts_.data();
    args.dtype = dtype_.data();
    args.grads = grads_.data();
    args.e = at("e");
    args.h = static_cast<const float*>(at("h"));
    args.v = at("v");
    args.e_new = at("e_new");
    args.h_new = static_cast<float*>(at("h_new"));
    args.v_new = at("v_new");
    args.a = state["a"].cast<float>();
    args.b = state["b"].cast<float>();
    args.p = state["p"].cast<float>();
    args.q = state["q"].cast<float>();
    args.mask = state["mask"].cast<bool>();
    args.state_dtype = state["state_dtype"].cast<int>();
    FLCORE_CHECK(args.state_dtype == F32 || args.state_dtype == BF16,
                 "state_dtype: expected 1 or 3, got ", args.state_dtype);
    args.rounding = philox_stream(seed, uint32_t(round), STREAM_STATE, 0);
    args.threads = threads;
  }
  FeedbackCall(const FeedbackCall&) = delete;
  FeedbackCall& operator=(const FeedbackCall&) = delete;

  FeedbackArgs args;

 private:
  std::vector<int64_t> starts_;
  std::vector<int> dtype_;
  std::vector<const void*> grads_;
};

}  // namespace flcore
