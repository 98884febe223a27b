// Packets in flcore._core: checking one, and the frame of one that Python fills.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"
#include "wire.h"

namespace py = pybind11;

namespace flcore {
namespace {

wire::Packet parse_packet(uintptr_t data, size_t bytes, uint64_t max_numel,
                          uint64_t max_payload_bytes, uint64_t max_tensors, int threads) {
  py::gil_scoped_release nogil;
  return wire::parse(reinterpret_cast<const uint8_t*>(data), bytes,
                     wire::Limits{max_numel, max_payload_bytes, max_tensors}, threads);
}

// A packet that is about to be written.
struct PacketFrame {
  wire::Frame frame;
  std::string tensors;
};

using SectionTuple = std::tuple<int, int, int64_t>;

PacketFrame make_frame(int codec, uint64_t numel, int value_dtype, int form, int bits, uint32_t tile,
                       int source_dtype, uint32_t flags, uint64_t round, uint64_t seed,
                       uint32_t epoch, const std::vector<SectionTuple>& sections,
                       const py::bytes& tensors) {
  FLCORE_CHECK(codec >= 0 && codec < wire::CODEC_COUNT, "codec: unknown code ", codec);
  FLCORE_CHECK(numel <= wire::HARD_MAX_NUMEL, "numel: out of range: ", numel);
  wire::Header h;
  h.codec = uint16_t(codec);
  h.flags = flags;
  h.numel = numel;
  h.round = round;
  h.seed = seed;
  h.epoch = epoch;
  h.source_dtype = uint8_t(source_dtype);
  h.value_dtype = uint8_t(value_dtype);
  h.index = uint8_t(form);
  h.bits = uint8_t(bits);
  h.tile = tile;
  std::vector<wire::Section> parts;
  for (const auto& [type, element, length] : sections) {
    FLCORE_CHECK(element > 0 && length >= 0, "sections: an element of ", element,
                 " bytes, a length of ", length);
    parts.push_back({uint16_t(type), uint32_t(element), 0, length});
  }
  PacketFrame made;
  made.tensors = tensors;
  FLCORE_CHECK(made.tensors.size() % size_t(wire::TENSOR_BYTES) == 0,
               "tensors: expected a multiple of 64 bytes, got ", made.tensors.size());
  made.frame = wire::plan(h, std::move(parts),
                          int64_t(made.tensors.size()) / wire::TENSOR_BYTES);
  return made;
}

void seal(const PacketFrame& made, uintptr_t address, int threads) {
  uint8_t* data = reinterpret_cast<uint8_t*>(address);
  py::gil_scoped_release nogil;
  wire::write_frame(made.frame, reinterpret_cast<const uint8_t*>(made.tensors.data()), data);
  wire::seal(data, size_t(made.frame.total_bytes), threads);
}

}  // namespace

void bind_wire(py::module_& m) {
  py::class_<wire::Packet>(m, "PacketView",
                           "A packet that passed every check; views memory that the caller keeps.")
      .def_readonly("k", &wire::Packet::k)
      .def(
          "section",
          [](const wire::Packet& p, int type) {
            return std::make_pair(p.frame.offset(uint16_t(type)), p.frame.length(uint16_t(type)));
          },
          py::arg("type"), "Offset and length in bytes of a section; the length is 0 without one.");
  m.def("parse_packet", &parse_packet, py::arg("data"), py::arg("bytes"), py::arg("max_numel"),
        py::arg("max_payload_bytes"), py::arg("max_tensors"), py::arg("threads") = 1,
        "Check a whole packet (csrc/wire.cpp); raises PacketError.");
  py::class_<PacketFrame>(m, "PacketFrame", "Header and sections of a packet to be written.")
      .def(py::init(&make_frame), py::kw_only(), py::arg("codec"), py::arg("numel"),
           py::arg("value_dtype"), py::arg("form"), py::arg("bits"), py::arg("tile"),
           py::arg("source_dtype"), py::arg("flags"), py::arg("round"), py::arg("seed"),
           py::arg("epoch"), py::arg("sections"), py::arg("tensors") = py::bytes())
      .def_property_readonly("nbytes", [](const PacketFrame& f) { return f.frame.total_bytes; })
      .def(
          "offset",
          [](const PacketFrame& f, int type) { return f.frame.offset(uint16_t(type)); },
          py::arg("type"), "Offset in bytes of a section.")
      .def("seal", &seal, py::arg("address"), py::arg("threads") = 1,
           "Write everything but the sections, and the checksum; the last step.");
  m.def(
      "crc32c",
      [](py::buffer data, uint32_t crc, int threads) {
        const py::buffer_info info = data.request();
        return cpu().crc32c->update(crc, static_cast<const uint8_t*>(info.ptr),
                                    info.size * info.itemsize, threads);
      },
      py::arg("data"), py::arg("crc") = 0, py::arg("threads") = 1, "CRC-32C of contiguous bytes.");
}

}  // namespace flcore
