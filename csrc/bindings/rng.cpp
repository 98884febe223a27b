// The counter RNG of flcore._core.
#include <pybind11/pybind11.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/random_args.h"

namespace py = pybind11;

namespace flcore {

static void fill_random(uintptr_t out, int64_t numel, int form, uint64_t seed, uint32_t round,
                        uint32_t tensor, uint32_t client, int64_t offset, int threads) {
  FLCORE_CHECK(form >= 0 && form < RANDOM_FORM_COUNT, "form: unknown code ", form);
  const RngFns& rng = *cpu().rng;
  const RngArgs args = random_args(out, numel, seed, round, tensor, client, offset, threads);
  py::gil_scoped_release nogil;
  (form == RANDOM_BITS ? rng.bits : form == RANDOM_UNIFORM ? rng.uniform : rng.normal)(args);
}

void bind_rng(py::module_& m) {
  m.def("random", &fill_random, py::arg("out"), py::arg("numel"), py::arg("form"), py::arg("seed"),
        py::arg("round"), py::arg("tensor"), py::arg("client"), py::arg("offset"),
        py::arg("threads"),
        "A stretch of a Philox stream (csrc/cpu/rng.isa.cpp) into uint32 or float32.");
}

}  // namespace flcore
