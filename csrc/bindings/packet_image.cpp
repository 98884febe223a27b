// PacketImage of flcore._core: what kernels on a device are given instead of packets.
#include "packet_image.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings/bindings.h"
#include "check.h"

namespace py = pybind11;

namespace flcore {

static PacketImage packet_image(const std::vector<const wire::Packet*>& packets,
                                const std::vector<double>& weights, int64_t numel, int threads) {
  FLCORE_CHECK(weights.size() == packets.size(), "weights: expected ", packets.size(), ", got ",
               weights.size());
  for (size_t i = 0; i < packets.size(); ++i)
    FLCORE_CHECK(packets[i]->header.numel == uint64_t(numel), "packets[", i, "]: holds ",
                 packets[i]->header.numel, " coordinates, out holds ", numel);
  return PacketImage(packets, weights, threads);
}

void bind_packet_image(py::module_& m) {
  py::class_<PacketImage>(m, "PacketImage", "Checked packets as bytes for another memory.")
      .def(py::init(&packet_image), py::arg("packets"), py::arg("weights"), py::arg("numel"),
           py::arg("threads"), py::keep_alive<1, 2>())
      .def_property_readonly("nbytes", &PacketImage::nbytes)
      .def_property_readonly("decoded", &PacketImage::decoded,
                             "Packets that are decoded, as their codes cannot be read one by one.")
      .def(
          "write",
          [](const PacketImage& image, uintptr_t data, uintptr_t base) {
            py::gil_scoped_release nogil;
            image.write(reinterpret_cast<uint8_t*>(data), base);
          },
          py::arg("data"), py::arg("base"),
          "Fill nbytes bytes at `data` that will be moved to `base`, a multiple of 16.");
}

}  // namespace flcore
