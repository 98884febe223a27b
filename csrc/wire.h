// Byte format of compressed updates, packet version 1 (docs/packet.md is the definition in words,
// python/flcore/reference/wire.py the definition in code). Knows neither Python nor kernels.
//
// Reading treats the bytes as hostile: every length, count, alignment and enumeration is checked
// with arithmetic that cannot overflow, against the buffer and the receiver's limits, before
// anything of a claimed size is allocated; then the checksum; then the contents. A packet that
// parse() returned can be decoded without further checks, and every value it decodes to is finite.
//
// wire.cpp knows the frame: header, section table, tensor table, checksum. What the sections of a
// codec must look like is a row of rules in wire_<family>.cpp (wire_rules.h).
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
constexpr int CODEC_COUNT = CODEC_THC + 1;
enum IndexCoding : uint8_t { SEEDED = 0, BITMASK = 1, TILE16 = 2, TILE_BITPACK = 3, TILE_RICE = 4 };
enum SectionType : uint16_t {
  SCALES = 1,
  CODES = 2,
  COUNTS = 3,
  INDICES = 4,
  VALUES = 5,
  FACTOR_P = 6,
  FACTOR_Q = 7,
  CODEBOOK = 8,
  TENSORS = 9,
  NORM = 10,
  PRIVATE = 0x8000
};

inline int64_t tiles(int64_t numel) { return (numel + TILE - 1) / TILE; }
inline int64_t value_bytes(int value_dtype) {
  return value_dtype == WIRE_INT8 || value_dtype == WIRE_E8M0 ? 1 : dtype_bytes(value_dtype);
}

// What a receiver is ready to accept.
struct Limits {
  uint64_t max_numel = uint64_t(1) << 32;
  uint64_t max_payload_bytes = uint64_t(1) << 35;
  uint64_t max_tensors = uint64_t(1) << 16;
};

struct Header {
  uint16_t codec = CODEC_SPARSE;
  uint32_t flags = CHECKSUM;
  uint64_t numel = 0;
  uint64_t payload_bytes = 0;
  uint64_t round = 0;
  uint64_t seed = 0;
  uint32_t epoch = 0;
  uint8_t source_dtype = 1;  // DType
  uint8_t value_dtype = 1;   // DType without F64, or WireValue: of values, scales or factors
  uint8_t index = TILE16;    // IndexCoding of a sparse packet; a form the codec defines otherwise
  uint8_t bits = 32;         // of a value or code
  uint32_t tile = uint32_t(TILE);  // tile of a sparse packet; bucket, block or rank otherwise
  uint32_t crc = 0;
};

// A part of a packet; the offset counts from the packet's first byte.
struct Section {
  uint16_t type;
  uint32_t element;  // bytes
  int64_t offset, length;
};

// Header and sections of a packet, in the order they are written; private sections left out.
struct Frame {
  Header header;
  std::vector<Section> sections;
  int64_t total_bytes = 0;

  const Section* find(uint16_t type) const {
    for (const Section& s : sections)
      if (s.type == type) return &s;
    return nullptr;
  }
  int64_t offset(uint16_t type) const { return find(type) ? find(type)->offset : total_bytes; }
  int64_t length(uint16_t type) const { return find(type) ? find(type)->length : 0; }
};

// A checked packet: a view of the caller's buffer, which must stay alive and unchanged.
struct Packet {
  Header header;
  Frame frame;
  const uint8_t* data = nullptr;
  int64_t k = 0;                // values it holds: entries when sparse, else all coordinates
  std::vector<int64_t> starts;  // sparse: [tiles + 1] first entry of each tile
  std::vector<uint16_t> local;  // sparse: [k] index in the tile, unless the packet itself has them
  int threads = 1;              // that check the contents
  std::vector<LowRankLayer> matrices;  // low rank: one a tensor

  const uint8_t* section(uint16_t type) const { return data + frame.offset(type); }
  PacketView view(double weight) const;
};

// Throws PacketError when the first 64 bytes are not a header that this reader knows.
Header read_header(const uint8_t* data, size_t size, const Limits& limits);

// Throws PacketError unless everything in the packet is as the format says.
Packet parse(const uint8_t* data, size_t size, const Limits& limits, int threads = 1);

// Lays sections out one after another: `offset` of those given is not read. A tensor table of
// tensor_count rows goes last.
Frame plan(const Header& header, std::vector<Section> sections, int64_t tensor_count);

// Writes header, section table, tensor table and padding; the sections are the caller's to fill.
// tensors: rows of 64 bytes, or null.
void write_frame(const Frame& frame, const uint8_t* tensors, uint8_t* data);

// Computes the checksum and stores it in the header. The last step.
void seal(uint8_t* data, size_t size, int threads = 1);

// ---- sparse packets (wire_sparse.cpp) ----------------------------------------------------------

// Where the sections of a sparse packet lie.
struct Layout {
  int64_t numel = 0, k = 0;
  int64_t scales_at = 0, counts_at = 0, indices_at = 0, values_at = 0;  // total_bytes if absent
  int64_t value_bytes = 4;
  int64_t total_bytes = 0;
  Frame frame;
};

// Sections of a packet of k kept of numel coordinates, in the order they are written. coded: bytes of
// the indices when they are bitpacked or Rice-coded.
Layout plan_sparse(const Header& header, int64_t k, int64_t tensor_count, int64_t coded = 0);

// Writes the frame and the tile counts; starts: [tiles + 1] as in Packet.
void write_sparse(const Layout& layout, const int64_t* starts, const uint8_t* tensors,
                  uint8_t* data);

// ---- bucket packets (wire_bucket.cpp) ----------------------------------------------------------

int scales_per_bucket(int codec);
// Bytes of the codes of a bucket of n coordinates.
int64_t bucket_code_bytes(const Header& header, int64_t n);
// Bytes of all codes.
int64_t code_bytes(const Header& header);
inline int64_t buckets(const Header& h) { return (int64_t(h.numel) + h.tile - 1) / h.tile; }

}  // namespace wire
}  // namespace flcore
