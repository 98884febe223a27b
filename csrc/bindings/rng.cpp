// The counter RNG of flcore._core.
#include <pybind11/pybind11.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/random_args.h"

namespace py = pybind11;

namespace flcore {

static void fill_random(uintptr_t out, int64_t numel, bool uniform, uint64_t seed, uint32_t round,
                        uint32_t tensor, uint32_t client, int64_t offset, int threads) {
  const RngArgs args = random_args(out, numel, seed, round, tensor, client, offset, threads);
  py::gil_scoped_release nogil;
  (uniform ? cpu().rng->uniform : cpu().rng->bits)(args);
}

void bind_rng(py::module_& m) {
  m.def("random", &fill_random, py::arg("out"), py::arg("numel"), py::arg("uniform"), py::arg("seed"),
        py::arg("round"), py::arg("tensor"), py::arg("client"), py::arg("offset"),
        py::arg("threads"),
        "A stretch of a Philox stream (csrc/cpu/rng.isa.cpp) into uint32 or float32.");
}

}  // namespace flcore
