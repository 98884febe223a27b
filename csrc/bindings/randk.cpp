// randk of flcore._core: sizes that C++ can check are checked here and in csrc/randk.cpp, what an
// address points to was checked in Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/feedback_call.h"
#include "bindings/sparse_call.h"
#include "check.h"
#include "randk.h"

namespace py = pybind11;

namespace flcore {

static int64_t randk_packet(const Addresses& layers, const std::vector<int64_t>& numel,
                            const std::vector<int>& dtype, const py::dict& state, int64_t k,
                            float scale, bool check, const py::dict& packet, int threads) {
  const SparsePacket out = sparse_packet(packet);
  const FeedbackCall call(layers, numel, dtype, state, out.header.seed, out.header.round, threads);
  py::gil_scoped_release nogil;
  return randk(call.args, k, scale, check, out);
}

static py::array_t<int64_t> random_coordinates(int64_t numel, int64_t k, uint64_t seed,
                                               uint64_t round, int threads) {
  FLCORE_CHECK(numel >= 0 && uint64_t(numel) <= wire::HARD_MAX_NUMEL && k >= 0 && k <= numel,
               "k: expected 0 to ", numel, ", got ", k);
  Support support;
  {
    py::gil_scoped_release nogil;
    support = random_support(numel, k, seed, round, threads);
  }
  py::array_t<int64_t> out{py::ssize_t(k)};
  int64_t* at = out.mutable_data();
  for (size_t t = 0; t + 1 < support.starts.size(); ++t)
    for (int64_t j = support.starts[t]; j < support.starts[t + 1]; ++j)
      *at++ = int64_t(t) * SPARSE_TILE + support.local[size_t(j)];
  return out;
}

void bind_randk(py::module_& m) {
  m.def("randk", &randk_packet, py::arg("layers"), py::arg("numel"), py::arg("dtype"),
        py::arg("state"), py::arg("k"), py::arg("scale"), py::arg("check"), py::arg("packet"),
        py::arg("threads"),
        "Feedback, values at the coordinates of a seed, packet, state update (csrc/randk.cpp); bytes, "
        "or -1: not finite.");
  m.def("random_coordinates", &random_coordinates, py::arg("numel"), py::arg("k"), py::arg("seed"),
        py::arg("round"), py::arg("threads"), "The coordinates of a seed and a round, sorted.");
}

}  // namespace flcore
