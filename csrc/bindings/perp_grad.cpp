// Gradients without their part along the weights, of flcore._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/combine_call.h"

namespace py = pybind11;

namespace flcore {

static bool perp_grad(int step, const Addresses& weight, const Addresses& grad,
                      const std::vector<int64_t>& numel, const std::vector<int>& dtype,
                      bool global, bool renormalize, double eps, double floor, uintptr_t sums,
                      uintptr_t rest, int threads) {
  check_table(weight, 1, numel, dtype);
  check_table(grad, 1, numel, dtype);
  FLCORE_CHECK(step >= 0 && step < PERP_STEP_COUNT, "step: unknown code ", step);
  FLCORE_CHECK(eps >= 0 && floor >= 0, "eps, floor: expected numbers from 0");
  const size_t layers = numel.size();
  FLCORE_CHECK(step == PERP_PROJECT || (sums && rest) || !layers, "sums, rest: expected addresses");
  size_t tiles = 0;
  for (int64_t count : numel) tiles += size_t((count + PERP_TILE - 1) / PERP_TILE);
  const auto w = pointers<const void>(weight);
  const auto g = pointers<>(grad);
  std::vector<PerpFactors> factors(layers + 1);
  std::vector<int64_t> first_tile(layers + 1);
  std::vector<double> own(step == PERP_PROJECT ? 6 * layers : 0);
  const Scratch tile_sums(int64_t(24 * tiles));
  PerpGradArgs args{};
  args.step = step;
  args.layers = int64_t(layers);
  args.numel = numel.data();
  args.dtype = dtype.data();
  args.weight = w.data();
  args.grad = g.data();
  args.global = global;
  args.renormalize = renormalize;
  args.eps = eps;
  args.floor = floor;
  args.sums = own.empty() ? reinterpret_cast<double*>(sums) : own.data();
  args.rest = own.empty() ? reinterpret_cast<double*>(rest) : own.data() + 3 * layers;
  args.factors = factors.data();
  args.first_tile = first_tile.data();
  args.tiles = reinterpret_cast<double*>(tile_sums.data());
  args.threads = threads < 1 ? 1 : threads;
  py::gil_scoped_release nogil;
  return cpu().perp_grad->perp_grad(args);
}

void bind_perp_grad(py::module_& m) {
  m.attr("PERP_TILE") = PERP_TILE;
  m.attr("PERP_LANES") = PERP_LANES;
  m.attr("PERP_JOIN") = PERP_JOIN;
  m.attr("PERP_CANCELS") = PERP_CANCELS;
  m.attr("PERP_NOTHING") = PERP_NOTHING;
  m.attr("PERP_STEPS") =
      py::make_tuple(int(PERP_PROJECT), int(PERP_SUMS), int(PERP_REST), int(PERP_APPLY));
  m.def("perp_grad", &perp_grad, py::arg("step"), py::arg("weight"), py::arg("grad"),
        py::arg("numel"), py::arg("dtype"), py::arg("global_scope"), py::arg("renormalize"),
        py::arg("eps"), py::arg("floor"), py::arg("sums") = 0, py::arg("rest") = 0,
        py::arg("threads") = 1,
        "A step of the projection (csrc/cpu/perp_grad.isa.cpp); sums and rest are float64 "
        "[layers][3]. PERP_REST returns whether rest is needed.");
}

}  // namespace flcore
