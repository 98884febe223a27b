// PowerSGD of flcore._core. Addresses arrive as integers; what they point to was checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/feedback_call.h"
#include "check.h"
#include "low_rank.h"

namespace py = pybind11;

namespace flcore {

using Sizes = std::vector<int64_t>;

static void check_numel(const FeedbackArgs& x, const LowRankPlan& plan) {
  FLCORE_CHECK(plan.numel == x.numel, "plan: expected ", x.numel, " coordinates, got ", plan.numel);
}

static void check_half_state(const FeedbackArgs& x) {
  FLCORE_CHECK(!x.e || x.e_new != x.e, "state: expected memory of its own for the new e");
}

static bool encode(const Addresses& layers, const Sizes& numel, const std::vector<int>& dtype,
                   const py::dict& state, uint64_t seed, uint64_t round,
                   const LowRankPlan& plan, uintptr_t start, uintptr_t next, int value_dtype,
                   uintptr_t p, uintptr_t q, uintptr_t values, int threads) {
  const FeedbackCall call(layers, numel, dtype, state, seed, round, threads);
  check_numel(call.args, plan);
  FLCORE_CHECK(value_dtype == F32 || value_dtype == BF16, "value_dtype: expected 1 or 3, got ",
               value_dtype);
  const LowRankPacket packet{reinterpret_cast<const float*>(start),
                             reinterpret_cast<float*>(next),
                             value_dtype,
                             reinterpret_cast<uint8_t*>(p),
                             reinterpret_cast<uint8_t*>(q),
                             reinterpret_cast<uint8_t*>(values)};
  py::gil_scoped_release nogil;
  return low_rank(call.args, plan, packet);
}

static bool half(const Addresses& layers, const Sizes& numel, const std::vector<int>& dtype,
                 const py::dict& state, uint64_t seed, uint64_t round, const LowRankPlan& plan,
                 bool back, uintptr_t factor, uintptr_t product, uintptr_t values, int threads) {
  const FeedbackCall call(layers, numel, dtype, state, seed, round, threads);
  check_numel(call.args, plan);
  check_half_state(call.args);
  py::gil_scoped_release nogil;
  return low_rank_half(call.args, plan, back, reinterpret_cast<const float*>(factor),
                       reinterpret_cast<float*>(product), reinterpret_cast<float*>(values));
}

void bind_low_rank(py::module_& m) {
  m.attr("LOW_RANK_MAX") = LOW_RANK_MAX;
  py::class_<LowRankPlan>(m, "LowRankPlan", "Layers as matrices, and where their parts lie.")
      .def(py::init<const Sizes&, const Sizes&, const Sizes&, const Sizes&>(), py::arg("numel"),
           py::arg("n"), py::arg("m"), py::arg("rank"))
      .def_readonly("p", &LowRankPlan::p)
      .def_readonly("q", &LowRankPlan::q)
      .def_readonly("values", &LowRankPlan::values);
  m.def("low_rank", &encode, py::arg("layers"), py::arg("numel"), py::arg("dtype"),
        py::arg("state"), py::arg("seed"), py::arg("round"), py::arg("plan"), py::arg("start"),
        py::arg("next"), py::arg("value_dtype"), py::arg("p"), py::arg("q"), py::arg("values"),
        py::arg("threads"),
        "Feedback, one power iteration, factors, state update (csrc/low_rank.cpp); False: not "
        "finite.");
  m.def("low_rank_half", &half, py::arg("layers"), py::arg("numel"), py::arg("dtype"),
        py::arg("state"), py::arg("seed"), py::arg("round"), py::arg("plan"), py::arg("back"),
        py::arg("factor"), py::arg("product"), py::arg("values"), py::arg("threads"),
        "One factor of the linear form; e keeps U (csrc/low_rank.cpp). False: not finite.");
  m.def(
      "low_rank_residual",
      [](const LowRankPlan& plan, uintptr_t p, uintptr_t q, uintptr_t e, uintptr_t e_new,
         int threads) {
        py::gil_scoped_release nogil;
        low_rank_residual(plan, reinterpret_cast<const float*>(p),
                          reinterpret_cast<const float*>(q), reinterpret_cast<const float*>(e),
                          reinterpret_cast<float*>(e_new), threads);
      },
      py::arg("plan"), py::arg("p"), py::arg("q"), py::arg("e"), py::arg("e_new"),
      py::arg("threads"), "e_new = e - P Q^T where a layer has factors.");
  m.def(
      "low_rank_orthonormalise",
      [](const LowRankPlan& plan, bool columns, uintptr_t in, uintptr_t out, int threads) {
        py::gil_scoped_release nogil;
        low_rank_orthonormalise(plan, columns, reinterpret_cast<const float*>(in),
                                reinterpret_cast<float*>(out), threads);
      },
      py::arg("plan"), py::arg("columns"), py::arg("in"), py::arg("out"), py::arg("threads"),
      "Orthonormal columns of P, or rows of Q^T, of every layer.");
}

}  // namespace flcore
