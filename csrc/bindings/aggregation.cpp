// Aggregation ops of flcore._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/combine_call.h"

namespace py = pybind11;

namespace flcore {

static int combine(const Addresses& rows, const std::vector<double>& weights,
                   const std::vector<int64_t>& numel, const std::vector<int>& dtype,
                   const Addresses& state, const Addresses& out, int accumulate, double divisor,
                   int threads, bool check) {
  const CombineCall call(rows, weights, numel, dtype, state, out, accumulate, divisor, threads,
                         check);
  py::gil_scoped_release nogil;
  return cpu().combine->combine(call.args);
}

static std::vector<int32_t> nonfinite(const Addresses& rows, int64_t n,
                                      const std::vector<int64_t>& numel,
                                      const std::vector<int>& dtype, int threads) {
  check_table(rows, n, numel, dtype);
  const auto x = pointers<const void>(rows);
  std::vector<int32_t> flags(size_t(n), 0);
  std::vector<int64_t> first_tile(numel.size() + 1);
  const FiniteArgs args{n,        int64_t(numel.size()), numel.data(), dtype.data(),
                        x.data(), flags.data(),          threads,      first_tile.data()};
  py::gil_scoped_release nogil;
  cpu().combine->nonfinite(args);
  return flags;
}

void bind_aggregation(py::module_& m) {
  m.attr("COMBINE_NONFINITE") = int(COMBINE_NONFINITE);
  m.attr("COMBINE_OUT_OF_RANGE") = int(COMBINE_OUT_OF_RANGE);
  m.def("combine", &combine, py::arg("rows"), py::arg("weights"), py::arg("numel"),
        py::arg("dtype"), py::arg("state"), py::arg("out"), py::arg("accumulate"),
        py::arg("divisor"), py::arg("threads"), py::arg("check") = true,
        "Weighted sum of client rows (csrc/cpu/combine.isa.cpp); returns CombineFlags.");
  m.def("nonfinite", &nonfinite, py::arg("rows"), py::arg("n"), py::arg("numel"), py::arg("dtype"),
        py::arg("threads"), "1 for each row that holds a NaN or an infinity, else 0.");
}

}  // namespace flcore
