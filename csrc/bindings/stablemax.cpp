// StableMax along a dimension, and collapse, of flcore._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

namespace py = pybind11;

namespace flcore {
namespace {

using Strides = std::array<int64_t, 3>;  // outer, row, class

template <class Data>
RowPlace<Data> place(uintptr_t address, const Strides& strides) {
  return {reinterpret_cast<Data*>(address), strides[0], strides[1], strides[2]};
}

void stablemax(int step, int dtype, int64_t rows, int64_t classes, int64_t inner, uintptr_t x,
               const Strides& x_strides, uintptr_t v, const Strides& v_strides, uintptr_t out,
               const Strides& out_strides, int threads) {
  FLCORE_CHECK(step >= 0 && step < STABLEMAX_STEP_COUNT, "step: unknown code ", step);
  FLCORE_CHECK(dtype >= 0 && dtype < DTYPE_COUNT, "dtype: unknown code ", dtype);
  FLCORE_CHECK(rows >= 0 && classes >= 0, "rows, classes: must not be negative");
  if (rows == 0 || classes == 0) return;
  FLCORE_CHECK(inner >= 1 && rows % inner == 0, "inner: expected a divisor of rows");
  const bool backward = step == STABLEMAX_BACKWARD || step == STABLEMAX_LOG_BACKWARD;
  FLCORE_CHECK(x && out && (v || !backward), "x, v, out: no address");
  const int fixed = x_strides[2] == 1 ? 2 : 1;
  FLCORE_CHECK(x_strides[fixed] == 1 && out_strides[fixed] == 1 &&
                   (!backward || v_strides[fixed] == 1),
               "strides: expected neighbouring classes in all arrays, or neighbouring rows");
  const StableMaxArgs args{step,
                           dtype,
                           rows,
                           classes,
                           inner,
                           place<const void>(x, x_strides),
                           place<const void>(v, v_strides),
                           place<void>(out, out_strides),
                           threads < 1 ? 1 : threads};
  py::gil_scoped_release nogil;
  cpu().stablemax->stablemax(args);
}

py::tuple collapse(int dtype, int64_t rows, int64_t classes, uintptr_t x, int64_t row_stride,
                   uintptr_t labels, int64_t ignore_index, double unit, int threads) {
  FLCORE_CHECK(dtype >= 0 && dtype < DTYPE_COUNT, "dtype: unknown code ", dtype);
  FLCORE_CHECK(rows >= 0 && classes >= 1, "rows, classes: expected at least one class");
  FLCORE_CHECK(!rows || (x && labels), "x, labels: no address");
  threads = threads < 1 ? 1 : threads;
  std::vector<CollapseCounts> found(static_cast<size_t>(threads));
  {
    py::gil_scoped_release nogil;
    cpu().stablemax->collapse(CollapseArgs{
        rows, classes, dtype, reinterpret_cast<const void*>(x), row_stride,
        reinterpret_cast<const int64_t*>(labels), ignore_index, unit, found.data(), threads,
        threads});
  }
  CollapseCounts total{};
  for (const CollapseCounts& part : found) {
    total.rows += part.rows;
    total.collapsed += part.collapsed;
    total.zero_loss += part.zero_loss;
    total.stablemax += part.stablemax;
    total.largest = part.largest > total.largest ? part.largest : total.largest;
    total.has_nan |= part.has_nan;
  }
  return py::make_tuple(total.rows, total.collapsed, total.zero_loss, total.stablemax,
                        total.largest, total.has_nan);
}

}  // namespace

void bind_stablemax(py::module_& m) {
  m.attr("STABLEMAX_STEPS") =
      py::make_tuple(int(STABLEMAX_FORWARD), int(STABLEMAX_LOG), int(STABLEMAX_BACKWARD),
                     int(STABLEMAX_LOG_BACKWARD));
  m.def("stablemax", &stablemax, py::arg("step"), py::arg("dtype"), py::arg("rows"),
        py::arg("classes"), py::arg("inner"), py::arg("x"), py::arg("x_strides"), py::arg("v"),
        py::arg("v_strides"), py::arg("out"), py::arg("out_strides"), py::arg("threads"),
        "StableMax or a gradient of it (csrc/cpu/stablemax.isa.cpp); strides: outer, row, class.");
  m.def("collapse", &collapse, py::arg("dtype"), py::arg("rows"), py::arg("classes"), py::arg("x"),
        py::arg("row_stride"), py::arg("labels"), py::arg("ignore_index"), py::arg("unit"),
        py::arg("threads"),
        "Rows that count, collapsed ones, those of zero loss, those that StableMax loses, the "
        "largest |x|, whether a row has NaN (csrc/cpu/collapse.h).");
}

}  // namespace flcore
