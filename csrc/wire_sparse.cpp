// Rules and layout of sparse packets: scales, tile counts, indices, values.
#include <cstring>
#include <utility>

#include "indices.h"
#include "randk.h"
#include "wire_rules.h"

namespace flcore {
namespace wire {
namespace {

#define NEED FLCORE_NEED

bool is_coded(const Header& h) { return h.index == TILE_BITPACK || h.index == TILE_RICE; }

void check_header(const Header& h) {
  NEED(h.value_dtype == F32 || h.value_dtype == F16 || h.value_dtype == BF16 ||
           h.value_dtype == WIRE_INT8,
       "value dtype: expected 1 (float32), 2 (float16), 3 (bfloat16), 4 (int8), got ",
       int(h.value_dtype));
  NEED(h.index <= TILE_RICE, "index coding: expected 0 (seeded), 1 (bitmask), 2 (tile16), ",
       "3 (bitpack), 4 (rice), got ", int(h.index));
  const int64_t bits = 8 * value_bytes(h.value_dtype);
  NEED(h.bits == bits, "expected ", bits, " bits a value, got ", int(h.bits));
  NEED(h.tile == TILE, "expected tiles of 65536 coordinates, got ", h.tile);
}

int64_t element_bytes(uint16_t type, const Header& h) {
  if (type == SCALES) return h.value_dtype == WIRE_INT8 ? 4 : 0;
  if (type == COUNTS) return 4;
  if (type == INDICES) return h.index == SEEDED ? 0 : h.index == TILE16 ? 2 : 1;
  return type == VALUES ? value_bytes(h.value_dtype) : 0;
}

// coded: bytes of the section when its length depends on the indices
int64_t indices_bytes(const Header& h, int64_t k, int64_t coded) {
  return h.index == TILE16 ? 2 * k : h.index == BITMASK ? (int64_t(h.numel) + 7) / 8 : coded;
}

// Section lengths equal what numel, k and the value width ask for; nothing else is trusted. Those of
// coded indices follow from their contents.
void check_lengths(Packet& packet) {
  const Header& h = packet.header;
  const int64_t per_tile = 4 * tiles(int64_t(h.numel));
  const auto check = [&](uint16_t type, const char* what, int64_t want) {
    const Section& section = need_section(packet, type, what);
    NEED(section.length == want, "section type ", type, ": expected ", want, " bytes for ",
         packet.k, " of ", h.numel, " coordinates, got ", section.length);
  };
  packet.k = need_section(packet, VALUES, "values").length / value_bytes(h.value_dtype);
  NEED(uint64_t(packet.k) <= h.numel, "holds ", packet.k, " values for ", h.numel, " coordinates");
  check(COUNTS, "tile counts", per_tile);
  if (h.value_dtype == WIRE_INT8) check(SCALES, "scales", per_tile);
  if (h.index != SEEDED)
    check(INDICES, "indices", indices_bytes(h, packet.k, packet.frame.length(INDICES)));
}

std::vector<int64_t> check_counts(const uint8_t* counts, int64_t numel, int64_t k) {
  const int64_t n = tiles(numel);
  std::vector<int64_t> starts(size_t(n) + 1);
  int64_t sum = 0;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t count = get<uint32_t>(counts + 4 * t), left = numel - t * TILE;
    NEED(count <= (left < TILE ? left : TILE),
         "a tile count exceeds the coordinates of its tile (", count, " in tile ", t, ")");
    starts[size_t(t)] = sum;
    sum += count;
  }
  starts[size_t(n)] = sum;
  NEED(sum == k, "the tile counts sum to ", sum, ", there are ", k, " values");
  return starts;
}

void check_tile16(const uint8_t* local, int64_t numel, int64_t k,
                  const std::vector<int64_t>& starts) {
  for (size_t t = 0; t + 1 < starts.size(); ++t) {
    int32_t gaps = 0;  // negative when any gap is: an "or" of differences, so that it vectorises
    for (int64_t j = starts[t] + 1; j < starts[t + 1]; ++j)
      gaps |= int32_t(get<uint16_t>(local + 2 * j)) - int32_t(get<uint16_t>(local + 2 * j - 2)) - 1;
    NEED(gaps >= 0, "the indices of tile ", t, " do not increase");
  }
  // the last tile may be short; its indices increase, so the last one bounds them
  if (k > 0 && starts[starts.size() - 2] < k) {
    const int64_t last = int64_t(starts.size() - 2) * TILE + get<uint16_t>(local + 2 * k - 2);
    NEED(last < numel, "index ", last, " is not below ", numel);
  }
}

void check_bitmask(const uint8_t* mask, int64_t numel, const std::vector<int64_t>& starts) {
  const int64_t bytes = (numel + 7) / 8;
  const int pad = int(8 * bytes - numel);
  NEED(pad == 0 || mask[bytes - 1] >> (8 - pad) == 0, "a pad bit of the bitmask is set");
  for (size_t t = 0; t + 1 < starts.size(); ++t) {
    const int64_t begin = int64_t(t) * (TILE / 8);
    const int64_t end = begin + TILE / 8 < bytes ? begin + TILE / 8 : bytes;
    int64_t bits = 0, i = begin;
    for (; i + 8 <= end; i += 8) {
      uint64_t word;
      std::memcpy(&word, mask + i, 8);
      bits += __builtin_popcountll(word);
    }
    for (; i < end; ++i) bits += __builtin_popcount(mask[i]);
    NEED(bits == starts[t + 1] - starts[t], "the bitmask does not match the tile counts (tile ", t,
         ")");
  }
}

// Indices that are not in the packet one by one are written out, 2 bytes for each value it holds.
void check_indices(Packet& packet, int64_t numel) {
  const Header& h = packet.header;
  const uint8_t* section = packet.section(INDICES);
  if (h.index == TILE16) check_tile16(section, numel, packet.k, packet.starts);
  if (h.index == BITMASK) check_bitmask(section, numel, packet.starts);
  if (is_coded(h)) {
    packet.local.resize(size_t(packet.k));
    read_indices(h.index, numel, packet.starts.data(), section, packet.frame.length(INDICES),
                 packet.threads, packet.local.data());
  }
  if (h.index == SEEDED) {
    Support support = random_support(numel, packet.k, h.seed, h.round, packet.threads);
    NEED(support.starts == packet.starts, "the tile counts are not those that the seed gives");
    packet.local = std::move(support.local);
  }
}

void check_scales(const uint8_t* scales, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    const uint32_t bits = get<uint32_t>(scales + 4 * t);
    float scale;
    std::memcpy(&scale, &bits, 4);
    NEED(bits >> 31 == 0 && 127.0 * double(scale) <= WIRE_LARGEST, "tile ", t,
         ": a scale is negative, not finite or too large");
  }
}

void check_contents(Packet& packet) {
  const Header& h = packet.header;
  const int64_t numel = int64_t(h.numel);
  packet.starts = check_counts(packet.section(COUNTS), numel, packet.k);
  check_indices(packet, numel);
  const uint8_t* values = packet.section(VALUES);
  if (h.value_dtype != WIRE_INT8) {
    NEED(values_finite(values, packet.k, h.value_dtype), "a value is not finite");
    return;
  }
  check_scales(packet.section(SCALES), tiles(numel));
  bool unused = false;
  for (int64_t j = 0; j < packet.k; ++j) unused |= values[j] == 0x80;
  NEED(!unused, "a value is -128, which is not used");
}

}  // namespace

const Rules SPARSE_RULES = {"sparse", &check_header, &element_bytes, &check_lengths,
                            &check_contents};

Layout plan_sparse(const Header& header, int64_t k, int64_t tensor_count, int64_t coded) {
  Header h = header;
  h.codec = CODEC_SPARSE;
  h.bits = uint8_t(8 * value_bytes(h.value_dtype));
  h.tile = uint32_t(TILE);
  Layout layout;
  layout.numel = int64_t(h.numel);
  layout.k = k;
  layout.value_bytes = value_bytes(h.value_dtype);
  const int64_t per_tile = 4 * tiles(layout.numel);
  const std::pair<uint16_t, int64_t> lengths[] = {{SCALES, per_tile},
                                                  {COUNTS, per_tile},
                                                  {INDICES, indices_bytes(h, k, coded)},
                                                  {VALUES, layout.value_bytes * k}};
  std::vector<Section> sections;
  for (const auto& [type, length] : lengths)
    if (const int64_t element = element_bytes(type, h))
      sections.push_back({type, uint32_t(element), 0, length});
  layout.frame = plan(h, std::move(sections), tensor_count);
  layout.scales_at = layout.frame.offset(SCALES);
  layout.counts_at = layout.frame.offset(COUNTS);
  layout.indices_at = layout.frame.offset(INDICES);
  layout.values_at = layout.frame.offset(VALUES);
  layout.total_bytes = layout.frame.total_bytes;
  return layout;
}

void write_sparse(const Layout& layout, const int64_t* starts, const uint8_t* tensors,
                  uint8_t* data) {
  write_frame(layout.frame, tensors, data);
  for (int64_t t = 0; t < tiles(layout.numel); ++t)
    put<uint32_t>(data + layout.counts_at + 4 * t, uint32_t(starts[t + 1] - starts[t]));
}

}  // namespace wire
}  // namespace flcore
