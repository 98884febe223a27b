// Low-bit weights of flcore._core: quantise, dequantise, change the layout.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

namespace py = pybind11;

namespace flcore {

namespace {

using Parts = std::array<uintptr_t, 4>;  // layout, codes, scales, zeros

WeightParts parts_of(const Parts& p) {
  FLCORE_CHECK(p[0] < uintptr_t(WEIGHT_LAYOUT_COUNT), "layout: unknown code ", p[0]);
  return {int(p[0]), reinterpret_cast<uint8_t*>(p[1]), reinterpret_cast<void*>(p[2]),
          reinterpret_cast<void*>(p[3])};
}

// n, k, bits, kind, group, scale_dtype
using Form = std::array<int64_t, 6>;

WeightQuantArgs args_of(const Form& form, uintptr_t table, const Parts& parts, int threads) {
  WeightQuantArgs a{};
  a.n = form[0];
  a.k = form[1];
  a.bits = int(form[2]);
  a.kind = int(form[3]);
  a.group = form[4];
  a.scale_dtype = int(form[5]);
  FLCORE_CHECK(a.n >= 0 && a.k >= 0, "shape: expected no negative size");
  FLCORE_CHECK(a.bits == 2 || a.bits == 3 || a.bits == 4 || a.bits == 8, "bits: got ", a.bits);
  FLCORE_CHECK(a.kind >= 0 && a.kind < QW_KIND_COUNT, "kind: unknown code ", a.kind);
  FLCORE_CHECK(a.group >= 16 && a.group % 16 == 0, "group: expected a multiple of 16, got ",
               a.group);
  FLCORE_CHECK(a.scale_dtype == F32 || a.scale_dtype == F16 || a.scale_dtype == BF16,
               "scale_dtype: unknown code ", a.scale_dtype);
  FLCORE_CHECK((a.kind == QW_TABLE) == (table != 0), "table: does not go with the kind");
  FLCORE_CHECK(a.kind != QW_TABLE || a.bits == 4, "bits: a table has 4");
  FLCORE_CHECK(a.kind < QW_E4M3 || a.bits == 8, "bits: FP8 has 8");
  a.table = reinterpret_cast<const float*>(table);
  a.parts = parts_of(parts);
  FLCORE_CHECK(a.kind != QW_FLOAT_ZERO || a.parts.zeros, "zeros: this kind needs them");
  FLCORE_CHECK(a.kind < QW_TABLE || !a.parts.zeros, "zeros: this kind has none");
  a.threads = threads < 1 ? 1 : threads;
  a.factor_count = 0;
  return a;
}

int quantize_weight(const Form& form, uintptr_t table, const Parts& parts, uintptr_t x, int x_dtype,
                    int rule, bool force_zero, bool tensor, float range_floor, float largest,
                    const std::vector<float>& factors, const std::vector<float>& limits,
                    const std::vector<float>& sorted, const std::vector<float>& order,
                    int threads) {
  WeightQuantArgs a = args_of(form, table, parts, threads);
  FLCORE_CHECK(x_dtype >= 0 && x_dtype < DTYPE_COUNT, "x_dtype: unknown code ", x_dtype);
  FLCORE_CHECK(rule >= 0 && rule < WEIGHT_RULE_COUNT, "rule: unknown code ", rule);
  FLCORE_CHECK(!factors.empty(), "factors: expected at least one");
  FLCORE_CHECK(!tensor || a.group >= a.k, "group: one scale for all rows needs whole rows");
  FLCORE_CHECK(
      a.kind != QW_TABLE || (limits.size() == 16 && sorted.size() == 16 && order.size() == 16),
      "limits, sorted, order: expected 16 numbers each");
  a.x = reinterpret_cast<void*>(x);
  a.x_dtype = x_dtype;
  a.rule = rule;
  a.force_zero = force_zero;
  a.tensor = tensor;
  a.range_floor = range_floor;
  a.largest = largest;
  a.factors = factors.data();
  a.factor_count = int64_t(factors.size());
  a.limits = limits.data();
  a.sorted = sorted.data();
  a.order = order.data();
  const Scratch scratch(cpu().weight_quant->scratch(a));
  a.scratch = scratch.data();
  py::gil_scoped_release nogil;
  return cpu().weight_quant->quantize(a);
}

void dequantize_weight(const Form& form, uintptr_t table, const Parts& parts, uintptr_t x,
                       int x_dtype, int threads) {
  WeightQuantArgs a = args_of(form, table, parts, threads);
  FLCORE_CHECK(x_dtype >= 0 && x_dtype < DTYPE_COUNT, "x_dtype: unknown code ", x_dtype);
  a.x = reinterpret_cast<void*>(x);
  a.x_dtype = x_dtype;
  const Scratch scratch(cpu().weight_quant->scratch(a));
  a.scratch = scratch.data();
  py::gil_scoped_release nogil;
  cpu().weight_quant->dequantize(a);
}

void repack_weight(const Form& form, uintptr_t table, const Parts& parts, const Parts& to,
                   int threads) {
  WeightQuantArgs a = args_of(form, table, parts, threads);
  a.to = parts_of(to);
  FLCORE_CHECK(!a.parts.zeros == !a.to.zeros, "zeros: expected in both layouts or in none");
  const Scratch scratch(cpu().weight_quant->scratch(a));
  a.scratch = scratch.data();
  py::gil_scoped_release nogil;
  cpu().weight_quant->repack(a);
}

}  // namespace

void bind_weight_quant(py::module_& m) {
  m.def("quantize_weight", &quantize_weight, py::arg("form"), py::arg("table"), py::arg("parts"),
        py::arg("x"), py::arg("x_dtype"), py::arg("rule"), py::arg("force_zero"), py::arg("tensor"),
        py::arg("range_floor"), py::arg("largest"), py::arg("factors"), py::arg("limits"),
        py::arg("sorted"), py::arg("order"), py::arg("threads"),
        "Quantise and pack a weight (csrc/cpu/weight_quant.isa.cpp); returns WeightFlags.");
  m.def("dequantize_weight", &dequantize_weight, py::arg("form"), py::arg("table"),
        py::arg("parts"), py::arg("x"), py::arg("x_dtype"), py::arg("threads"),
        "The numbers that a weight stands for.");
  m.def("repack_weight", &repack_weight, py::arg("form"), py::arg("table"), py::arg("parts"),
        py::arg("to"), py::arg("threads"), "Change the layout of a weight.");
}

}  // namespace flcore
