// flcore._cuda: the launchers of kernels/launch.h. Built only where nvcc is; loads without a driver.
// Every call names the device and the caller's stream, queues its kernels and returns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "api.h"
#include "bindings/combine_call.h"
#include "bindings/random_args.h"
#include "launch.h"

namespace py = pybind11;

namespace flcore {

static py::tuple device_count() {
  std::string why;
  const int count = cuda::device_count(&why);
  return py::make_tuple(count, why);
}

static void combine(const Addresses& rows, const std::vector<double>& weights,
                    const std::vector<int64_t>& numel, const std::vector<int>& dtype,
                    const Addresses& state, const Addresses& out, int accumulate, double divisor,
                    uintptr_t flags, int device, uintptr_t stream) {
  const CombineCall call(rows, weights, numel, dtype, state, out, accumulate, divisor, 1);
  py::gil_scoped_release nogil;
  cuda::launch_combine(call.args, reinterpret_cast<int32_t*>(flags), device, stream);
}

static void nonfinite(const Addresses& rows, int64_t n, const std::vector<int64_t>& numel,
                      const std::vector<int>& dtype, uintptr_t flags, int device,
                      uintptr_t stream) {
  check_table(rows, n, numel, dtype);
  const auto x = pointers<const void>(rows);
  const FiniteArgs args{n,        int64_t(numel.size()),             numel.data(), dtype.data(),
                        x.data(), reinterpret_cast<int32_t*>(flags), 1,            nullptr};
  py::gil_scoped_release nogil;
  cuda::launch_nonfinite(args, device, stream);
}

static void fill_random(uintptr_t out, int64_t numel, int form, uint64_t seed, uint32_t round,
                        uint32_t tensor, uint32_t client, int64_t offset, int device,
                        uintptr_t stream) {
  FLCORE_CHECK(form >= 0 && form < RANDOM_FORM_COUNT, "form: unknown code ", form);
  const RngArgs args = random_args(out, numel, seed, round, tensor, client, offset, 1);
  py::gil_scoped_release nogil;
  cuda::launch_random(args, form, device, stream);
}

}  // namespace flcore

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  using namespace flcore;
  m.def("device_count", &device_count, "(number of devices, why there is none)");
  m.attr("COMBINE_MAX_ROWS") = cuda::COMBINE_MAX_ROWS;
  m.def("combine", &combine, py::arg("rows"), py::arg("weights"), py::arg("numel"),
        py::arg("dtype"), py::arg("state"), py::arg("out"), py::arg("accumulate"),
        py::arg("divisor"), py::arg("flags"), py::arg("device"), py::arg("stream"),
        "Weighted sum of client rows (kernels/combine.cu); CombineFlags are or-ed into flags[0].");
  m.def("nonfinite", &nonfinite, py::arg("rows"), py::arg("n"), py::arg("numel"), py::arg("dtype"),
        py::arg("flags"), py::arg("device"), py::arg("stream"),
        "flags[i] = 1 for each row that holds a NaN or an infinity.");
  m.def("random", &fill_random, py::arg("out"), py::arg("numel"), py::arg("form"), py::arg("seed"),
        py::arg("round"), py::arg("tensor"), py::arg("client"), py::arg("offset"),
        py::arg("device"), py::arg("stream"),
        "A stretch of a Philox stream (kernels/rng.cu) into uint32 or float32.");
}
