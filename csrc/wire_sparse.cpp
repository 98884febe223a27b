// Rules and layout of sparse packets: tile counts, indices, values.
#include <cstring>

#include "wire_rules.h"

namespace flcore {
namespace wire {
namespace {

#define NEED FLCORE_NEED

void check_header(const Header& h) {
  NEED(h.value_dtype == F32 || h.value_dtype == F16 || h.value_dtype == BF16,
       "value dtype: expected 1 (float32), 2 (float16), 3 (bfloat16), got ", int(h.value_dtype));
  NEED(h.index == BITMASK || h.index == TILE16,
       "index coding: expected 1 (bitmask), 2 (tile16), got ", int(h.index));
  const int64_t bits = 8 * dtype_bytes(h.value_dtype);
  NEED(h.bits == bits, "expected ", bits, " bits a value, got ", int(h.bits));
  NEED(h.tile == TILE, "expected tiles of 65536 coordinates, got ", h.tile);
}

int64_t element_bytes(uint16_t type, const Header& h) {
  return type == COUNTS    ? 4
         : type == INDICES ? (h.index == TILE16 ? 2 : 1)
         : type == VALUES  ? dtype_bytes(h.value_dtype)
                           : 0;
}

int64_t indices_bytes(const Header& h, int64_t k) {
  return h.index == TILE16 ? 2 * k : (int64_t(h.numel) + 7) / 8;
}

// Section lengths equal what numel, k and the value width ask for; nothing else is trusted.
void check_lengths(Packet& packet) {
  const Header& h = packet.header;
  const Section& counts = need_section(packet, COUNTS, "tile counts");
  const Section& indices = need_section(packet, INDICES, "indices");
  const Section& values = need_section(packet, VALUES, "values");
  packet.k = values.length / value_bytes(h.value_dtype);
  NEED(uint64_t(packet.k) <= h.numel, "holds ", packet.k, " values for ", h.numel, " coordinates");
  const struct {
    const Section& section;
    int64_t want;
  } lengths[] = {{counts, 4 * tiles(int64_t(h.numel))}, {indices, indices_bytes(h, packet.k)}};
  for (const auto& [section, want] : lengths)
    NEED(section.length == want, "section type ", section.type, ": expected ", want,
         " bytes for ", packet.k, " of ", h.numel, " coordinates, got ", section.length);
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

void check_contents(Packet& packet) {
  const Header& h = packet.header;
  const int64_t numel = int64_t(h.numel);
  packet.starts = check_counts(packet.section(COUNTS), numel, packet.k);
  if (h.index == TILE16)
    check_tile16(packet.section(INDICES), numel, packet.k, packet.starts);
  else
    check_bitmask(packet.section(INDICES), numel, packet.starts);
  NEED(values_finite(packet.section(VALUES), packet.k, h.value_dtype), "a value is not finite");
}

}  // namespace

const Rules SPARSE_RULES = {"sparse", &check_header, &element_bytes, &check_lengths,
                            &check_contents};

Layout plan_sparse(const Header& header, int64_t k, int64_t tensor_count) {
  Header h = header;
  h.codec = CODEC_SPARSE;
  h.bits = uint8_t(8 * value_bytes(h.value_dtype));
  h.tile = uint32_t(TILE);
  Layout layout;
  layout.numel = int64_t(h.numel);
  layout.k = k;
  layout.value_bytes = value_bytes(h.value_dtype);
  layout.indices_bytes = indices_bytes(h, k);
  const auto element = [&](uint16_t type) { return uint32_t(element_bytes(type, h)); };
  layout.frame = plan(h,
                      {{COUNTS, element(COUNTS), 0, 4 * tiles(layout.numel)},
                       {INDICES, element(INDICES), 0, layout.indices_bytes},
                       {VALUES, element(VALUES), 0, layout.value_bytes * k}},
                      tensor_count);
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
