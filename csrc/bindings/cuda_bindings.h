// The register functions of flcore._cuda beyond those in cuda.cpp, which calls them once.
#pragma once

#include <pybind11/pybind11.h>

namespace flcore {

void bind_cuda_compression(pybind11::module_& m);
void bind_cuda_qmatmul(pybind11::module_& m);

}  // namespace flcore
