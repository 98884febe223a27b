// SparsePacket from the keyword arguments that ops of sparse packets pass as one dict.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "check.h"
#include "sparse_emit.h"

namespace flcore {

inline SparsePacket sparse_packet(const pybind11::dict& fields) {
  const auto number = [&](const char* name) { return fields[name].cast<uint64_t>(); };
  const auto code = [&](const char* name, uint64_t first, uint64_t last) {
    const uint64_t value = number(name);
    FLCORE_CHECK(value >= first && value <= last, name, ": unknown code ", value);
    return uint8_t(value);
  };
  SparsePacket packet;
  packet.header.flags = uint32_t(number("flags"));
  packet.header.round = number("round");
  packet.header.seed = number("seed");
  packet.header.epoch = uint32_t(number("epoch"));
  packet.header.source_dtype = code("source_dtype", F64, BF16);
  packet.header.value_dtype = code("value_dtype", F32, WIRE_INT8);
  packet.header.index = code("index", wire::SEEDED, wire::TILE_RICE);
  packet.choice = IndexChoice(code("choice", INDEX_GIVEN, INDEX_SMALLEST));
  packet.tensors = reinterpret_cast<const uint8_t*>(uintptr_t(number("tensors")));
  packet.tensor_count = int64_t(number("tensor_count"));
  packet.out = reinterpret_cast<uint8_t*>(uintptr_t(number("out")));
  packet.capacity = int64_t(number("capacity"));
  return packet;
}

}  // namespace flcore
