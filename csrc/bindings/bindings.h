// The register function of each family, called once by core.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <vector>

namespace flcore {

void bind_aggregation(pybind11::module_& m);
void bind_compression(pybind11::module_& m);
void bind_sparsify(pybind11::module_& m);
void bind_wire(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);
void bind_indices(pybind11::module_& m);
void bind_randk(pybind11::module_& m);
void bind_rng(pybind11::module_& m);
void bind_moments(pybind11::module_& m);
void bind_mask(pybind11::module_& m);
void bind_select(pybind11::module_& m);
void bind_gram(pybind11::module_& m);
void bind_low_rank(pybind11::module_& m);
void bind_sketch(pybind11::module_& m);
void bind_vote(pybind11::module_& m);
void bind_lut_add(pybind11::module_& m);
void bind_rowloss(pybind11::module_& m);
void bind_packet_image(pybind11::module_& m);
void bind_perp_grad(pybind11::module_& m);
void bind_local_step(pybind11::module_& m);
void bind_stablemax(pybind11::module_& m);
void bind_weight_quant(pybind11::module_& m);
void bind_qembedding(pybind11::module_& m);
void bind_qmatmul(pybind11::module_& m);
void bind_qmatmul_dx(pybind11::module_& m);
void bind_qmatmul_int8(pybind11::module_& m);

// Addresses arrive as integers: Python owns allocation and validation, kernels get pointers.
template <class T = void>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<T*> p(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) p[i] = reinterpret_cast<T*>(addresses[i]);
  return p;
}

// Working memory of a kernel, on cache lines of its own; not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(static_cast<char*>(::operator new(size_t(bytes), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return memory_; }

 private:
  char* memory_;
};

}  // namespace flcore
