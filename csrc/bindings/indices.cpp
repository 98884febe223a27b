// Coded indices of flcore._core: the section of a packet from coordinates, and back.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"
#include "indices.h"
#include "wire.h"

namespace py = pybind11;

namespace flcore {

static void check_tiles(int coding, int64_t numel, const std::vector<int64_t>& starts) {
  FLCORE_CHECK(coding == INDEX_BITPACK || coding == INDEX_RICE, "coding: unknown code ", coding);
  FLCORE_CHECK(numel >= 0 && int64_t(starts.size()) == wire::tiles(numel) + 1 && starts[0] == 0,
               "starts: expected ", wire::tiles(numel) + 1, " values from 0 on");
  for (size_t t = 0; t + 1 < starts.size(); ++t) {
    const int64_t count = starts[t + 1] - starts[t], left = numel - int64_t(t) * wire::TILE;
    FLCORE_CHECK(count >= 0 && count <= (left < wire::TILE ? left : wire::TILE),
                 "starts: tile ", t, " cannot hold ", count, " entries");
  }
}

static py::array_t<uint8_t> encode_indices(int coding, int64_t numel,
                                           const std::vector<int64_t>& starts, uintptr_t local,
                                           int threads) {
  check_tiles(coding, numel, starts);
  const auto* entries = reinterpret_cast<const uint16_t*>(local);
  IndexPlan plan;
  {
    py::gil_scoped_release nogil;
    plan = plan_indices(coding, numel, starts.data(), entries, threads);
  }
  py::array_t<uint8_t> out{py::ssize_t(plan.bytes)};
  uint8_t* data = out.mutable_data();
  {
    py::gil_scoped_release nogil;
    write_indices(plan, numel, starts.data(), entries, threads, data);
  }
  return out;
}

static void decode_indices(int coding, int64_t numel, const std::vector<int64_t>& starts,
                           uintptr_t section, int64_t bytes, uintptr_t local, int threads) {
  check_tiles(coding, numel, starts);
  py::gil_scoped_release nogil;
  read_indices(coding, numel, starts.data(), reinterpret_cast<const uint8_t*>(section), bytes,
               threads, reinterpret_cast<uint16_t*>(local));
}

void bind_indices(py::module_& m) {
  m.def("encode_indices", &encode_indices, py::arg("coding"), py::arg("numel"), py::arg("starts"),
        py::arg("local"), py::arg("threads"), "Coordinates of tiles as a section (csrc/indices.cpp).");
  m.def("decode_indices", &decode_indices, py::arg("coding"), py::arg("numel"), py::arg("starts"),
        py::arg("section"), py::arg("bytes"), py::arg("local"), py::arg("threads"),
        "Check a section and write its coordinates; raises PacketError.");
}

}  // namespace flcore
