// Byte format of compressed updates, packet version 1 (docs/packet.md is the definition in words,
// python/flcore/reference/wire.py the definition in code). Knows neither Python nor kernels.
//
// Reading treats the bytes as hostile: every length, count, alignment and enumeration is checked
// with arithmetic that cannot overflow, against the buffer and the receiver's limits, before
// anything of a claimed size is allocated; then the checksum; then the contents. A packet that
// parse() returned can be decoded without further checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "api.h"

namespace flcore {
namespace wire {

constexpr int64_t HEADER_BYTES = 64;
constexpr int64_t TABLE_BYTES = 8;   // section count and a reserved word, before the entries
constexpr int64_t ENTRY_BYTES = 24;
constexpr int64_t ALIGN = 64;
constexpr int64_t TILE = SPARSE_TILE;  // coordinates: a local index fits in 16 bits
constexpr int64_t SLACK_BYTES = 4096;
constexpr int64_t TENSOR_BYTES = 64;
constexpr uint64_t HARD_MAX_NUMEL = uint64_t(1) << 48;    // products of sizes stay in 64 bits
constexpr uint64_t HARD_MAX_PAYLOAD = uint64_t(1) << 62;

enum Flags : uint32_t { CHECKSUM = 1, NONFINITE = 2, RESYNC = 4, INCREMENT = 16 };
enum Codec : uint16_t { SPARSE = 1 };
enum IndexCoding : uint8_t { BITMASK = 1, TILE16 = 2 };
enum SectionType : uint16_t { COUNTS = 3, INDICES = 4, VALUES = 5, TENSORS = 9, PRIVATE = 0x8000 };

inline int64_t tiles(int64_t numel) { return (numel + TILE - 1) / TILE; }

// What a receiver is ready to accept.
struct Limits {
  uint64_t max_numel = uint64_t(1) << 32;
  uint64_t max_payload_bytes = uint64_t(1) << 35;
  uint64_t max_tensors = uint64_t(1) << 16;
};

struct Header {
  uint32_t flags = CHECKSUM;
  uint64_t numel = 0;
  uint64_t payload_bytes = 0;
  uint64_t round = 0;
  uint64_t seed = 0;
  uint32_t epoch = 0;
  uint8_t source_dtype = 1;  // DType
  uint8_t value_dtype = 1;   // DType without F64
  uint8_t index = TILE16;    // IndexCoding
  uint32_t crc = 0;
};

// Where the sections of a sparse packet lie. Offsets count from the first byte of the packet.
struct Layout {
  int64_t numel = 0, k = 0;
  int64_t counts_at = 0, indices_at = 0, values_at = 0, tensors_at = 0;
  int64_t indices_bytes = 0, value_bytes = 4, tensor_count = 0;
  int64_t total_bytes = 0;
};

// A checked packet: a view of the caller's buffer, which must stay alive and unchanged.
struct Packet {
  Header header;
  Layout layout;
  const uint8_t* data = nullptr;
  std::vector<int64_t> starts;  // [tiles + 1] first entry of each tile: exclusive scan of counts
};

// Throws PacketError when the first 64 bytes are not a header that this reader knows.
Header read_header(const uint8_t* data, size_t size, const Limits& limits);

// Throws PacketError unless everything in the packet is as the format says.
Packet parse(const uint8_t* data, size_t size, const Limits& limits);

// Sections of a packet of k kept of numel coordinates, in the order they are written.
Layout plan(int64_t numel, int64_t k, int index, int value_dtype, int64_t tensor_count);

// Writes header, section table, tile counts, tensor table and padding; indices and values are the
// caller's to fill. starts: [tiles + 1] as in Packet; tensors: rows of 64 bytes, or null.
void write_frame(const Layout& layout, const int64_t* starts, const uint8_t* tensors,
                 Header header, uint8_t* data);

// Computes the checksum and stores it in the header. The last step.
void seal(uint8_t* data, size_t size);

}  // namespace wire
}  // namespace flcore
