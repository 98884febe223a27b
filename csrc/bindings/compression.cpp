// Compression ops of flcore._core: packets, sparsify, decode. Addresses arrive as integers; sizes
// that C++ can check are checked here, what an address points to was checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"
#include "sparsify.h"
#include "wire.h"

namespace py = pybind11;

namespace flcore {

using Addresses = std::vector<uintptr_t>;

// First coordinate of each layer, then their total.
static std::vector<int64_t> layer_starts(const std::vector<int64_t>& numel,
                                         const Addresses& layers, const std::vector<int>& dtype) {
  FLCORE_CHECK(layers.size() == numel.size() && dtype.size() == numel.size(),
               "layers: expected ", numel.size(), " addresses and dtypes, got ", layers.size(),
               " and ", dtype.size());
  std::vector<int64_t> starts(numel.size() + 1, 0);
  for (size_t i = 0; i < numel.size(); ++i) {
    FLCORE_CHECK(numel[i] >= 0 && starts[i] <= std::numeric_limits<int64_t>::max() - numel[i],
                 "numel[", i, "]: out of range: ", numel[i]);
    starts[i + 1] = starts[i] + numel[i];
  }
  return starts;
}

static wire::Packet parse_packet(uintptr_t data, size_t bytes, uint64_t max_numel,
                                 uint64_t max_payload_bytes, uint64_t max_tensors) {
  py::gil_scoped_release nogil;
  return wire::parse(reinterpret_cast<const uint8_t*>(data), bytes,
                     wire::Limits{max_numel, max_payload_bytes, max_tensors});
}

static bool sparsify_packet(const Addresses& layers, const std::vector<int64_t>& numel,
                            const std::vector<int>& dtype, uintptr_t e, uintptr_t h, float a,
                            float b, int64_t k, int source_dtype, int value_dtype, int index,
                            uint32_t flags, uint64_t round, uint64_t seed, uint32_t epoch,
                            uintptr_t tensors, int64_t tensor_count, uintptr_t out,
                            int64_t out_bytes, int threads) {
  const auto starts = layer_starts(numel, layers, dtype);
  for (int d : dtype) FLCORE_CHECK(d >= 0 && d < DTYPE_COUNT, "dtype: unknown code ", d);
  FLCORE_CHECK(source_dtype >= 0 && source_dtype < DTYPE_COUNT, "source_dtype: unknown code");
  FLCORE_CHECK(value_dtype > F64 && value_dtype < DTYPE_COUNT, "value_dtype: unknown code");
  FLCORE_CHECK(index == wire::BITMASK || index == wire::TILE16, "index: unknown code");
  const auto grads = pointers<const void>(layers);
  const SparsifyArgs args{starts.back(),
                          int64_t(numel.size()),
                          starts.data(),
                          dtype.data(),
                          grads.data(),
                          reinterpret_cast<float*>(e),
                          reinterpret_cast<float*>(h),
                          a,
                          b,
                          threads};
  SparsifyPacket packet;
  packet.k = k;
  packet.header.flags = flags;
  packet.header.round = round;
  packet.header.seed = seed;
  packet.header.epoch = epoch;
  packet.header.source_dtype = uint8_t(source_dtype);
  packet.header.value_dtype = uint8_t(value_dtype);
  packet.header.index = uint8_t(index);
  packet.tensors = reinterpret_cast<const uint8_t*>(tensors);
  packet.tensor_count = tensor_count;
  packet.out = reinterpret_cast<uint8_t*>(out);
  packet.out_bytes = out_bytes;
  py::gil_scoped_release nogil;
  return sparsify(args, packet);
}

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
  std::vector<SparseView> views;
  for (size_t i = 0; i < packets.size(); ++i) {
    const wire::Packet& p = *packets[i];
    FLCORE_CHECK(p.layout.numel == starts.back(), "packets[", i, "]: holds ", p.layout.numel,
                 " coordinates, out holds ", starts.back());
    views.push_back({p.data + p.layout.indices_at, p.data + p.layout.values_at, p.starts.data(),
                     weights[i], p.header.index == wire::BITMASK, p.header.value_dtype});
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
  py::class_<wire::Packet>(m, "PacketView",
                           "A packet that passed every check; views memory that the caller keeps.")
      .def_property_readonly("k", [](const wire::Packet& p) { return p.layout.k; });
  m.def("parse_packet", &parse_packet, py::arg("data"), py::arg("bytes"), py::arg("max_numel"),
        py::arg("max_payload_bytes"), py::arg("max_tensors"),
        "Check a whole packet (csrc/wire.cpp); raises PacketError.");
  m.def("sparsify", &sparsify_packet, py::arg("layers"), py::arg("numel"), py::arg("dtype"),
        py::arg("e"), py::arg("h"), py::arg("a"), py::arg("b"), py::arg("k"),
        py::arg("source_dtype"), py::arg("value_dtype"), py::arg("index"), py::arg("flags"),
        py::arg("round"), py::arg("seed"), py::arg("epoch"), py::arg("tensors"),
        py::arg("tensor_count"), py::arg("out"), py::arg("out_bytes"), py::arg("threads"),
        "Feedback, exact top-k, packet, state update (csrc/sparsify.cpp); False: not finite.");
  m.def("decode", &decode, py::arg("packets"), py::arg("weights"), py::arg("out"),
        py::arg("numel"), py::arg("dtype"), py::arg("add"), py::arg("threads"),
        "Packets into accumulators (csrc/cpu/decode.isa.cpp).");
  m.def(
      "crc32c",
      [](py::buffer data, uint32_t crc) {
        const py::buffer_info info = data.request();
        return cpu().crc32c->update(crc, static_cast<const uint8_t*>(info.ptr),
                                    info.size * info.itemsize);
      },
      py::arg("data"), py::arg("crc") = 0, "CRC-32C of contiguous bytes.");
}

}  // namespace flcore
