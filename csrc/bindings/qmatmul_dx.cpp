// Gradient of a product with a packed weight, of flcore._core.
#include <pybind11/pybind11.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/qmatmul_call.h"

namespace flcore {

void bind_qmatmul_dx(pybind11::module_& m) {
  def_qmatmul(m, "qmatmul_dx", &CpuTable::qmatmul_dx, true,
              "dX = dY W + low up from a packed weight (csrc/cpu/qmatmul_dx.isa.cpp).");
}

}  // namespace flcore
