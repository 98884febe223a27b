// Row losses of flcore._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

namespace py = pybind11;

namespace flcore {
namespace {

template <class T = const void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void rowloss(int mode, int64_t rows, int64_t classes, int map, int dtype, uintptr_t x,
             int64_t inner, int64_t outer_stride, int64_t row_stride, int64_t class_stride,
             uintptr_t grad, int64_t grad_outer_stride, int64_t grad_row_stride,
             int64_t grad_class_stride, uintptr_t labels, int label_bytes, uintptr_t soft,
             uintptr_t valid, int64_t ignore_index, int64_t label_offset, bool shard,
             uintptr_t weight, uintptr_t prior, uintptr_t row_scale, double weight_sum,
             double classes_present, double smoothing, double logit_scale, double margin,
             double z_loss, double tau, uintptr_t upstream, double grad_scale, uintptr_t loss,
             uintptr_t rest, uintptr_t own, uintptr_t shift, int threads) {
  FLCORE_CHECK(mode >= 0 && mode <= 2, "mode: unknown code ", mode);
  FLCORE_CHECK(map >= 0 && map < ROW_MAP_COUNT, "map: unknown code ", map);
  FLCORE_CHECK(dtype >= 0 && dtype < DTYPE_COUNT, "dtype: unknown code ", dtype);
  FLCORE_CHECK(rows >= 0 && classes >= 0 && inner >= 0, "rows, classes: must not be negative");
  if (rows == 0 || classes == 0) return;
  FLCORE_CHECK(inner >= 1, "inner: expected at least 1");
  FLCORE_CHECK(x, "x: no address");
  FLCORE_CHECK(!labels != !soft, "labels, soft: expected exactly one of them");
  FLCORE_CHECK(!labels || label_bytes == 4 || label_bytes == 8, "label_bytes: got ", label_bytes);
  FLCORE_CHECK(mode == 0 || grad, "grad: no address");
  FLCORE_CHECK(mode != 2 || (rest && own && (shift || map != ROW_SOFTMAX)),
               "rest, own, shift: backward reads them");
  threads = threads < 1 ? 1 : threads;
  RowLossArgs args{rows,
                   classes,
                   map,
                   dtype,
                   pointer(x),
                   inner,
                   outer_stride,
                   row_stride,
                   class_stride,
                   pointer<void>(grad),
                   grad_outer_stride,
                   grad_row_stride,
                   grad_class_stride,
                   pointer(labels),
                   label_bytes,
                   pointer(soft),
                   pointer<const uint8_t>(valid),
                   ignore_index,
                   label_offset,
                   shard,
                   pointer(weight),
                   pointer(prior),
                   pointer(row_scale),
                   weight_sum,
                   classes_present,
                   smoothing,
                   logit_scale,
                   margin,
                   z_loss,
                   tau,
                   pointer(upstream),
                   grad_scale,
                   pointer<void>(loss),
                   pointer<void>(rest),
                   pointer<void>(own),
                   pointer<void>(shift),
                   threads};
  py::gil_scoped_release nogil;
  const RowLossFns& fns = *cpu().rowloss;
  const Scratch scratch(fns.scratch(args));
  args.scratch = scratch.data();
  (mode == 0 ? fns.forward : mode == 1 ? fns.both : fns.backward)(args);
}

py::tuple targets(uintptr_t labels, int label_bytes, int64_t rows, uintptr_t valid,
                  int64_t ignore_index, int64_t classes, uintptr_t weight, bool is_float64,
                  uintptr_t prior, bool prior_is_log, int64_t label_offset) {
  FLCORE_CHECK(label_bytes == 4 || label_bytes == 8, "label_bytes: got ", label_bytes);
  RowTargets found;
  {
    py::gil_scoped_release nogil;
    found = cpu().rowloss->targets(RowTargetsArgs{
        pointer(labels), label_bytes, rows, pointer<const uint8_t>(valid), ignore_index,
        label_offset, classes, pointer(weight), pointer(prior), is_float64, prior_is_log});
  }
  return py::make_tuple(found.count, found.weight_total, found.first_bad);
}

}  // namespace

void bind_rowloss(py::module_& m) {
  m.attr("ROW_MAPS") = py::make_tuple("softmax", "stablemax", "taylor");
  m.def("rowloss", &rowloss, py::arg("mode"), py::kw_only(), py::arg("rows"), py::arg("classes"),
        py::arg("map"), py::arg("dtype"), py::arg("x"), py::arg("inner"), py::arg("outer_stride"),
        py::arg("row_stride"), py::arg("class_stride"), py::arg("grad") = 0,
        py::arg("grad_outer_stride") = 0, py::arg("grad_row_stride") = 0,
        py::arg("grad_class_stride") = 0, py::arg("labels") = 0, py::arg("label_bytes") = 8,
        py::arg("soft") = 0, py::arg("valid") = 0, py::arg("ignore_index") = -100,
        py::arg("label_offset") = 0, py::arg("shard") = false, py::arg("weight") = 0,
        py::arg("prior") = 0, py::arg("row_scale") = 0, py::arg("weight_sum") = 0.0,
        py::arg("classes_present") = 0.0, py::arg("smoothing") = 0.0, py::arg("logit_scale") = 1.0,
        py::arg("margin") = 0.0, py::arg("z_loss") = 0.0, py::arg("tau") = 1.0,
        py::arg("upstream") = 0, py::arg("grad_scale") = 1.0, py::arg("loss") = 0,
        py::arg("rest") = 0, py::arg("own") = 0, py::arg("shift") = 0, py::arg("threads") = 1,
        "Losses and gradients of rows (csrc/cpu/rowloss.isa.cpp); mode: 0 forward, 1 both, "
        "2 backward.");
  m.def("rowloss_targets", &targets, py::arg("labels"), py::arg("label_bytes"), py::arg("rows"),
        py::arg("valid"), py::arg("ignore_index"), py::arg("classes"), py::arg("weight"),
        py::arg("is_float64"), py::arg("prior"), py::arg("prior_is_log"),
        py::arg("label_offset") = 0,
        "Rows that count, the sum of their weights, the first row without a class (or -1).");
}

}  // namespace flcore
