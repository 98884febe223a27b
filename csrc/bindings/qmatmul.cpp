// Products with weights of 2 to 8 bits, of flcore._core.
#include <pybind11/pybind11.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/qmatmul_call.h"

namespace py = pybind11;

namespace flcore {

void bind_qmatmul(py::module_& m) {
  m.attr("QWEIGHT_KINDS") = py::make_tuple(int(QW_INT), int(QW_FLOAT_ZERO), int(QW_TABLE),
                                           int(QW_E4M3), int(QW_E5M2));
  py::class_<QWeight>(m, "QWeight", "A checked weight; what it points to must outlive it.")
      .def(py::init(&quantized_weight), py::arg("fields"));
  def_qmatmul(m, "qmatmul", &CpuTable::qmatmul, false,
              "y = x W^T + bias + low up^T (csrc/cpu/qmatmul.isa.cpp).");
}

}  // namespace flcore
