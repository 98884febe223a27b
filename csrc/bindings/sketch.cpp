// Count sketches of flcore._core. Addresses arrive as integers; what they point to was checked in
// Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/feedback_call.h"
#include "check.h"
#include "sketch.h"

namespace py = pybind11;

namespace flcore {
namespace {

SketchHash sketch_hash(uint64_t seed, int64_t rows, int64_t columns) {
  FLCORE_CHECK(rows >= 1 && rows <= SKETCH_ROWS && rows % 2 == 1,
               "rows: expected an odd number up to ", SKETCH_ROWS, ", got ", rows);
  FLCORE_CHECK(columns >= 1 && columns < (int64_t(1) << 32), "columns: out of range: ", columns);
  return {seed, rows, columns};
}

SketchTable sketch_table(uintptr_t cells, uint64_t seed, int64_t rows, int64_t columns,
                         int64_t numel, int threads) {
  FLCORE_CHECK(numel >= 0 && numel <= PHILOX_LENGTH, "numel: out of range: ", numel);
  return {sketch_hash(seed, rows, columns), numel, reinterpret_cast<const float*>(cells), threads};
}

bool sketch(const Addresses& layers, const std::vector<int64_t>& numel,
            const std::vector<int>& dtype, const py::dict& state, uint64_t seed, int64_t rows,
            int64_t columns, int64_t parts, uintptr_t cells, uintptr_t more, int threads) {
  const FeedbackCall call(layers, numel, dtype, state, 0, 0, threads);
  FLCORE_CHECK(call.args.numel <= PHILOX_LENGTH, "numel: out of range: ", call.args.numel);
  FLCORE_CHECK(!call.args.e && !call.args.h && !call.args.v, "state: a sketch keeps none");
  FLCORE_CHECK(parts >= 1, "parts: expected at least 1, got ", parts);
  const SketchArgs args{&call.args, sketch_hash(seed, rows, columns), parts,
                        reinterpret_cast<float*>(cells), reinterpret_cast<float*>(more)};
  py::gil_scoped_release nogil;
  return cpu().sketch->sketch(args);
}

}  // namespace

void bind_sketch(py::module_& m) {
  m.def("sketch", &sketch, py::arg("layers"), py::arg("numel"), py::arg("dtype"),
        py::arg("state"), py::arg("seed"), py::arg("rows"), py::arg("columns"), py::arg("parts"),
        py::arg("cells"), py::arg("more"), py::arg("threads"),
        "The count sketch of an update (csrc/cpu/sketch.isa.cpp); False: not finite.");
  m.def(
      "sketch_estimate",
      [](uintptr_t cells, uint64_t seed, int64_t rows, int64_t columns, int64_t begin,
         int64_t count, uintptr_t out, int threads) {
        const SketchTable table = sketch_table(cells, seed, rows, columns, begin + count, threads);
        py::gil_scoped_release nogil;
        cpu().sketch->estimate(table, begin, count, reinterpret_cast<float*>(out));
      },
      py::arg("cells"), py::arg("seed"), py::arg("rows"), py::arg("columns"), py::arg("begin"),
      py::arg("count"), py::arg("out"), py::arg("threads"), "Estimates of a run of coordinates.");
  m.def(
      "sketch_top_k",
      [](uintptr_t cells, uint64_t seed, int64_t rows, int64_t columns, int64_t numel, int64_t k,
         uintptr_t index, uintptr_t values, int threads) {
        const SketchTable table = sketch_table(cells, seed, rows, columns, numel, threads);
        FLCORE_CHECK(k >= 0 && k <= numel, "k: expected 0 to ", numel, ", got ", k);
        py::gil_scoped_release nogil;
        sketch_top_k(table, k, reinterpret_cast<int64_t*>(index),
                     reinterpret_cast<float*>(values));
      },
      py::arg("cells"), py::arg("seed"), py::arg("rows"), py::arg("columns"), py::arg("numel"),
      py::arg("k"), py::arg("index"), py::arg("values"), py::arg("threads"),
      "The k largest estimates (csrc/sketch.cpp).");
  m.def(
      "sketch_scatter",
      [](uint64_t seed, int64_t rows, int64_t columns, uintptr_t index, uintptr_t values,
         int64_t count, uintptr_t cells, int threads) {
        const SketchHash hash = sketch_hash(seed, rows, columns);
        py::gil_scoped_release nogil;
        cpu().sketch->scatter(hash, reinterpret_cast<const int64_t*>(index),
                              reinterpret_cast<const float*>(values), count,
                              reinterpret_cast<float*>(cells), threads);
      },
      py::arg("seed"), py::arg("rows"), py::arg("columns"), py::arg("index"), py::arg("values"),
      py::arg("count"), py::arg("cells"), py::arg("threads"),
      "Adds to the cells of a few coordinates; without values sets them to 0.");
}

}  // namespace flcore
