// The register function of each family, called once by core.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace flcore {

void bind_aggregation(pybind11::module_& m);
void bind_compression(pybind11::module_& m);
void bind_rng(pybind11::module_& m);

// Addresses arrive as integers: Python owns allocation and validation, kernels get pointers.
template <class T = void>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<T*> p(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) p[i] = reinterpret_cast<T*>(addresses[i]);
  return p;
}

}  // namespace flcore
