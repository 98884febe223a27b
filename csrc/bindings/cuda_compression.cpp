// Packets in flcore._cuda: decoding lists of them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/cuda_bindings.h"
#include "bindings/feedback_call.h"
#include "check.h"
#include "launch.h"

namespace py = pybind11;

namespace flcore {

// views: address on the device of an image that PacketImage wrote for it.
static void decode(uintptr_t views, int64_t packets, const Addresses& out,
                   const std::vector<int64_t>& numel, const std::vector<int>& dtype, bool add,
                   int device, uintptr_t stream) {
  FLCORE_CHECK(packets >= 0, "packets: got ", packets);
  const auto starts = layer_starts(numel, out, dtype);
  for (int d : dtype)
    FLCORE_CHECK(d == F64 || d == F32, "out: expected float64 or float32, got code ", d);
  const auto targets = pointers<>(out);
  const DecodeArgs args{starts.back(),
                        packets,
                        reinterpret_cast<const PacketView*>(views),
                        int64_t(numel.size()),
                        starts.data(),
                        dtype.data(),
                        targets.data(),
                        1};
  py::gil_scoped_release nogil;
  cuda::launch_decode(args, add, device, stream);
}

void bind_cuda_compression(py::module_& m) {
  m.def("decode", &decode, py::arg("views"), py::arg("packets"), py::arg("out"), py::arg("numel"),
        py::arg("dtype"), py::arg("add"), py::arg("device"), py::arg("stream"),
        "Packets into accumulators (kernels/decode.cu); views: a PacketImage on the device.");
}

}  // namespace flcore
