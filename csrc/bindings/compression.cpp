// Compression ops of flcore._core: decode. Addresses arrive as integers; sizes
// that C++ can check are checked here, what an address points to was checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/feedback_call.h"
#include "check.h"
#include "wire.h"

namespace py = pybind11;

namespace flcore {

// Checks that every packet has as many coordinates as the layers, then runs the kernel.
static void decode(const std::vector<const wire::Packet*>& packets,
                   const std::vector<double>& weights, const Addresses& out,
                   const std::vector<int64_t>& numel, const std::vector<int>& dtype, bool add,
                   int threads) {
  const auto starts = layer_starts(numel, out, dtype);
  for (int d : dtype)
    FLCORE_CHECK(d == F64 || d == F32, "out: expected float64 or float32, got code ", d);
  FLCORE_CHECK(weights.size() == packets.size(), "weights: expected ", packets.size(), ", got ",
               weights.size());
  FLCORE_CHECK(add || packets.size() == 1, "packets: expected one, got ", packets.size());
  std::vector<PacketView> views;
  for (size_t i = 0; i < packets.size(); ++i) {
    const uint64_t holds = packets[i]->header.numel;
    FLCORE_CHECK(holds == uint64_t(starts.back()), "packets[", i, "]: holds ", holds,
                 " coordinates, out holds ", starts.back());
    views.push_back(packets[i]->view(weights[i]));
  }
  const auto targets = pointers<>(out);
  const DecodeArgs args{starts.back(),          int64_t(views.size()), views.data(),
                        int64_t(numel.size()),  starts.data(),         dtype.data(),
                        targets.data(),         threads};
  py::gil_scoped_release nogil;
  if (add)
    cpu().decode->add(args);
  else
    cpu().decode->dense(args);
}

void bind_compression(py::module_& m) {
  m.def("decode", &decode, py::arg("packets"), py::arg("weights"), py::arg("out"),
        py::arg("numel"), py::arg("dtype"), py::arg("add"), py::arg("threads"),
        "Packets into accumulators (csrc/cpu/decode.isa.cpp).");
}

}  // namespace flcore
