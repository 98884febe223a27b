// Bags of table rows of flcore._core.
#include <pybind11/pybind11.h>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

namespace py = pybind11;

namespace flcore {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void qembedding(int64_t k, int bits, int kind, int64_t group, uintptr_t codes, int64_t code_stride,
                uintptr_t scales, int value_dtype, uintptr_t zeros, uintptr_t table, int64_t bags,
                uintptr_t index, uintptr_t starts, uintptr_t coefficients, bool mean,
                int64_t padding, uintptr_t out, int out_dtype, int64_t out_stride, uintptr_t rows,
                bool add, int threads) {
  FLCORE_CHECK(k >= 0 && bags >= 0, "k, bags: must not be negative");
  if (k == 0 || bags == 0) return;
  FLCORE_CHECK(kind >= 0 && kind <= QE_FLOAT, "kind: unknown code ", kind);
  FLCORE_CHECK(value_dtype >= F32 && value_dtype <= BF16, "value_dtype: unknown code ",
               value_dtype);
  FLCORE_CHECK(out_dtype >= F32 && out_dtype <= BF16, "out_dtype: unknown code ", out_dtype);
  if (kind != QE_FLOAT) {
    FLCORE_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits: got ", bits);
    FLCORE_CHECK(kind != QW_TABLE || bits == 4, "bits: a table has 4, got ", bits);
    FLCORE_CHECK(kind < QW_E4M3 || bits == 8, "bits: fp8 has 8, got ", bits);
    FLCORE_CHECK(group >= k || (group >= 16 && group % 16 == 0), "group: got ", group);
    FLCORE_CHECK(scales, "scales: no address");
    FLCORE_CHECK((kind == QW_FLOAT_ZERO) <= (zeros != 0), "zeros: no address");
    FLCORE_CHECK((kind == QW_TABLE) <= (table != 0), "table: no address");
  }
  FLCORE_CHECK(codes && index && starts && out, "codes, index, starts, out: no address");
  FLCORE_CHECK(out_stride >= k, "out_stride: expected at least ", k, ", got ", out_stride);
  const QEmbeddingArgs args{k,
                            bits,
                            kind,
                            group < 1 || group > k ? k : group,
                            at<const uint8_t>(codes),
                            code_stride,
                            at<const void>(scales),
                            value_dtype,
                            at<const void>(zeros),
                            at<const float>(table),
                            bags,
                            at<const int64_t>(index),
                            at<const int64_t>(starts),
                            at<const float>(coefficients),
                            mean,
                            padding,
                            at<void>(out),
                            out_dtype,
                            out_stride,
                            at<const int64_t>(rows),
                            add,
                            threads < 1 ? 1 : threads};
  py::gil_scoped_release nogil;
  cpu().qembedding->run(args);
}

}  // namespace

void bind_qembedding(py::module_& m) {
  m.attr("QE_FLOAT") = int(QE_FLOAT);
  m.def("qembedding", &qembedding, py::arg("k"), py::arg("bits"), py::arg("kind"),
        py::arg("group"), py::arg("codes"), py::arg("code_stride"), py::arg("scales"),
        py::arg("value_dtype"), py::arg("zeros"), py::arg("table"), py::arg("bags"),
        py::arg("index"), py::arg("starts"), py::arg("coefficients"), py::arg("mean"),
        py::arg("padding"), py::arg("out"), py::arg("out_dtype"), py::arg("out_stride"),
        py::arg("rows"), py::arg("add"), py::arg("threads"),
        "Bags of table rows (csrc/cpu/qembedding.isa.cpp).");
}

}  // namespace flcore
