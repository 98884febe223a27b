// Reader and writer of packet version 1. Fields are read and written one by one in little-endian
// order, so neither the host's byte order nor struct padding can reach the wire.
#include "wire.h"

#include <cstring>

#include "api.h"
#include "check.h"

namespace flcore {
namespace wire {
namespace {

#define NEED(condition, ...)                                                         \
  do {                                                                               \
    if (!(condition)) throw PacketError(::flcore::text("packet: ", __VA_ARGS__));    \
  } while (0)

constexpr uint32_t KNOWN_FLAGS = CHECKSUM | NONFINITE | RESYNC | INCREMENT;

template <class T>
T get(const uint8_t* p) {
  T v = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  std::memcpy(&v, p, sizeof(T));  // what the loop says, in a form that loops over it vectorise
#else
  for (size_t i = 0; i < sizeof(T); ++i) v = T(v | T(T(p[i]) << (8 * i)));
#endif
  return v;
}

template <class T>
void put(uint8_t* p, T v) {
  for (size_t i = 0; i < sizeof(T); ++i) p[i] = uint8_t(v >> (8 * i));
}

int64_t align_up(int64_t offset) { return (offset + ALIGN - 1) / ALIGN * ALIGN; }

bool all_zero(const uint8_t* p, int64_t bytes) {
  uint8_t any = 0;
  for (int64_t i = 0; i < bytes; ++i) any |= p[i];
  return any == 0;
}

uint32_t checksum(const uint8_t* data, size_t size) {  // of the packet with its CRC field as zero
  const uint8_t zero[4] = {0, 0, 0, 0};
  const auto crc = cpu().crc32c->update;
  return crc(crc(crc(0, data, 60), zero, 4), data + HEADER_BYTES, int64_t(size) - HEADER_BYTES);
}

struct Section {
  bool present = false;
  int64_t offset = 0, length = 0;
};

struct Sections {
  Section counts, indices, values, tensors;
  Section* of(uint16_t type) {
    return type == COUNTS    ? &counts
           : type == INDICES ? &indices
           : type == VALUES  ? &values
           : type == TENSORS ? &tensors
                             : nullptr;
  }
};

int64_t element_bytes(uint16_t type, const Header& h) {
  return type == COUNTS    ? 4
         : type == INDICES ? (h.index == TILE16 ? 2 : 1)
         : type == VALUES  ? dtype_bytes(h.value_dtype)
                           : TENSOR_BYTES;
}

// All sections lie inside the buffer, aligned, one after another, with zero padding between them.
Sections read_table(const uint8_t* data, int64_t size, const Header& h) {
  NEED(size >= HEADER_BYTES + TABLE_BYTES, "no room for a section table in ", size, " bytes");
  const int64_t count = get<uint32_t>(data + HEADER_BYTES);
  NEED(get<uint32_t>(data + HEADER_BYTES + 4) == 0,
       "the reserved word of the section table is not zero");
  const int64_t room = (size - HEADER_BYTES - TABLE_BYTES) / ENTRY_BYTES;
  NEED(count <= room, "claims ", count, " sections, there is room for ", room);
  Sections found;
  int64_t end = HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * count;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* entry = data + HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * i;
    const uint16_t type = get<uint16_t>(entry), flags = get<uint16_t>(entry + 2);
    const uint32_t element = get<uint32_t>(entry + 4);
    const uint64_t offset = get<uint64_t>(entry + 8), length = get<uint64_t>(entry + 16);
    const int64_t start = align_up(end);
    NEED(offset == uint64_t(start), "section ", i, " (type ", type, "): expected offset ", start,
         " (64-byte aligned, after the section before it), got ", offset);
    NEED(start <= size && length <= uint64_t(size - start), "section ", i, " (type ", type,
         ") of ", length, " bytes at ", offset, " leaves the packet of ", size);
    NEED(all_zero(data + end, start - end), "the padding before section ", i, " is not zero");
    if (type < PRIVATE) {
      Section* section = found.of(type);
      NEED(section, "section type ", type, " is unknown for codec 1 (sparse)");
      NEED(!section->present, "section type ", type, " appears twice");
      NEED(flags == 0, "section ", i, " (type ", type, "): unknown flags ", flags);
      NEED(element == element_bytes(type, h), "section ", i, " (type ", type,
           "): expected elements of ", element_bytes(type, h), " bytes, got ", element);
      *section = {true, start, int64_t(length)};
    }
    end = start + int64_t(length);
  }
  NEED(end == size, "the sections end at byte ", end, ", the packet at ", size);
  return found;
}

// Section lengths equal what numel, k and the value width ask for; nothing else is trusted.
Layout check_lengths(const Sections& s, const Header& h, int64_t size, const Limits& limits) {
  NEED(s.counts.present, "section type 3 (tile counts) is missing");
  NEED(s.indices.present, "section type 4 (indices) is missing");
  NEED(s.values.present, "section type 5 (values) is missing");
  Layout layout;
  layout.numel = int64_t(h.numel);
  layout.value_bytes = dtype_bytes(h.value_dtype);
  NEED(s.values.length % layout.value_bytes == 0, "values of ", s.values.length,
       " bytes are no multiple of ", layout.value_bytes);
  layout.k = s.values.length / layout.value_bytes;
  NEED(layout.k <= layout.numel, "holds ", layout.k, " values for ", h.numel, " coordinates");
  layout.indices_bytes = h.index == TILE16 ? 2 * layout.k : (layout.numel + 7) / 8;
  const int64_t counts_bytes = 4 * tiles(layout.numel);
  NEED(s.counts.length == counts_bytes, "section type 3: expected ", counts_bytes, " bytes for ",
       layout.k, " of ", h.numel, " coordinates, got ", s.counts.length);
  NEED(s.indices.length == layout.indices_bytes, "section type 4: expected ",
       layout.indices_bytes, " bytes for ", layout.k, " of ", h.numel, " coordinates, got ",
       s.indices.length);
  NEED(s.tensors.length % TENSOR_BYTES == 0, "a tensor table of ", s.tensors.length,
       " bytes is no multiple of 64");
  layout.tensor_count = s.tensors.length / TENSOR_BYTES;
  NEED(uint64_t(layout.tensor_count) <= limits.max_tensors, layout.tensor_count,
       " tensors, the receiver's limit max_tensors is ", limits.max_tensors);
  const int64_t allowed = 8 * layout.numel + SLACK_BYTES + s.tensors.length;
  NEED(size - HEADER_BYTES <= allowed, "a payload of ", size - HEADER_BYTES, " bytes for ",
       h.numel, " coordinates, at most ", allowed);
  layout.counts_at = s.counts.offset;
  layout.indices_at = s.indices.offset;
  layout.values_at = s.values.offset;
  layout.tensors_at = s.tensors.offset;
  layout.total_bytes = size;
  return layout;
}

std::vector<int64_t> check_counts(const uint8_t* counts, const Layout& layout) {
  const int64_t n = tiles(layout.numel);
  std::vector<int64_t> starts(size_t(n) + 1);
  int64_t sum = 0;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t count = get<uint32_t>(counts + 4 * t), left = layout.numel - t * TILE;
    NEED(count <= (left < TILE ? left : TILE),
         "a tile count exceeds the coordinates of its tile (", count, " in tile ", t, ")");
    starts[size_t(t)] = sum;
    sum += count;
  }
  starts[size_t(n)] = sum;
  NEED(sum == layout.k, "the tile counts sum to ", sum, ", there are ", layout.k, " values");
  return starts;
}

void check_tile16(const uint8_t* local, const Layout& layout, const std::vector<int64_t>& starts) {
  for (size_t t = 0; t + 1 < starts.size(); ++t) {
    int32_t gaps = 0;  // negative when any gap is: an "or" of differences, so that it vectorises
    for (int64_t j = starts[t] + 1; j < starts[t + 1]; ++j)
      gaps |= int32_t(get<uint16_t>(local + 2 * j)) - int32_t(get<uint16_t>(local + 2 * j - 2)) - 1;
    NEED(gaps >= 0, "the indices of tile ", t, " do not increase");
  }
  // the last tile may be short; its indices increase, so the last one bounds them
  if (layout.k > 0 && starts[starts.size() - 2] < layout.k) {
    const int64_t last = int64_t(starts.size() - 2) * TILE + get<uint16_t>(local + 2 * layout.k - 2);
    NEED(last < layout.numel, "index ", last, " is not below ", layout.numel);
  }
}

void check_bitmask(const uint8_t* mask, const Layout& layout, const std::vector<int64_t>& starts) {
  const int pad = int(8 * layout.indices_bytes - layout.numel);
  NEED(pad == 0 || mask[layout.indices_bytes - 1] >> (8 - pad) == 0,
       "a pad bit of the bitmask is set");
  for (size_t t = 0; t + 1 < starts.size(); ++t) {
    const int64_t begin = int64_t(t) * (TILE / 8);
    const int64_t end = begin + TILE / 8 < layout.indices_bytes ? begin + TILE / 8
                                                                : layout.indices_bytes;
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

// largest: bits of the largest finite value
template <class T>
bool values_finite(const uint8_t* values, int64_t k, int32_t largest) {
  const T magnitude = T(T(-1) >> 1);
  int32_t room = 0;  // negative when any value is NaN or infinite
  for (int64_t j = 0; j < k; ++j)
    room |= largest - int32_t(get<T>(values + int64_t(sizeof(T)) * j) & magnitude);
  return room >= 0;
}

// Consecutive tensors that cover all coordinates.
void check_tensors(const uint8_t* table, const Layout& layout) {
  int64_t end = 0;
  for (int64_t i = 0; i < layout.tensor_count; ++i) {
    const uint8_t* row = table + TENSOR_BYTES * i;
    const uint64_t offset = get<uint64_t>(row + 8), count = get<uint64_t>(row + 16);
    const int ndim = row[24];
    NEED(all_zero(row + 25, 7), "tensor ", i, ": its padding is not zero");
    NEED(ndim <= 8, "tensor ", i, ": expected at most 8 dimensions, got ", ndim);
    NEED(all_zero(row + 32 + 4 * ndim, 4 * (8 - ndim)), "tensor ", i,
         ": an unused dimension is not zero");
    bool empty = false, overflow = false;
    uint64_t product = 1;
    for (int d = 0; d < ndim; ++d) {
      const uint64_t dim = get<uint32_t>(row + 32 + 4 * d);
      empty |= dim == 0;
      overflow |= __builtin_mul_overflow(product, dim ? dim : 1, &product);
    }
    if (empty) product = 0;
    NEED((empty || !overflow) && product == count, "tensor ", i, ": its dimensions do not hold ",
         count, " values");
    NEED(offset == uint64_t(end), "tensor ", i, ": expected offset ", end, ", got ", offset);
    NEED(count <= uint64_t(layout.numel - end), "tensor ", i, " ends beyond coordinate ",
         layout.numel);
    end += int64_t(count);
  }
  NEED(layout.tensor_count == 0 || end == layout.numel, "the tensor table covers ", end, " of ",
       layout.numel, " coordinates");
}

}  // namespace

// ---- reading ----------------------------------------------------------------------------------

Header read_header(const uint8_t* data, size_t size, const Limits& limits) {
  NEED(size >= size_t(HEADER_BYTES), "expected at least 64 bytes, got ", size);
  NEED(std::memcmp(data, "FLCU", 4) == 0, "expected the magic bytes 'FLCU'");
  NEED(data[4] == 1, "expected format version 1, got ", int(data[4]));
  const int header_bytes = get<uint16_t>(data + 6);
  NEED(header_bytes == HEADER_BYTES, "expected a header of 64 bytes, got ", header_bytes);
  const int codec = get<uint16_t>(data + 8), revision = get<uint16_t>(data + 10);
  NEED(codec == SPARSE, "codec: expected 1 (sparse), got ", codec);
  NEED(revision == 0, "expected revision 0 of codec 1 (sparse), got ", revision);
  Header h;
  h.flags = get<uint32_t>(data + 12);
  h.numel = get<uint64_t>(data + 16);
  h.payload_bytes = get<uint64_t>(data + 24);
  h.round = get<uint64_t>(data + 32);
  h.seed = get<uint64_t>(data + 40);
  h.epoch = get<uint32_t>(data + 48);
  h.source_dtype = data[52];
  h.value_dtype = data[53];
  h.index = data[54];
  h.crc = get<uint32_t>(data + 60);
  NEED((h.flags & ~KNOWN_FLAGS) == 0, "flags ", h.flags,
       " hold bits unknown for codec 1 (sparse)");
  NEED((h.flags & CHECKSUM) || h.crc == 0, "the checksum field is set but its flag is not");
  NEED(h.value_dtype == F32 || h.value_dtype == F16 || h.value_dtype == BF16,
       "value dtype: expected 1 (float32), 2 (float16), 3 (bfloat16), got ", int(h.value_dtype));
  NEED(h.source_dtype < DTYPE_COUNT, "source dtype: expected 0 (float64), 1 (float32), ",
       "2 (float16), 3 (bfloat16), got ", int(h.source_dtype));
  NEED(h.index == BITMASK || h.index == TILE16,
       "index coding: expected 1 (bitmask), 2 (tile16), got ", int(h.index));
  const int64_t bits = 8 * dtype_bytes(h.value_dtype);
  NEED(data[55] == bits, "expected ", bits, " bits a value, got ", int(data[55]));
  const uint32_t tile = get<uint32_t>(data + 56);
  NEED(tile == TILE, "expected tiles of 65536 coordinates, got ", tile);
  NEED(h.numel <= limits.max_numel && h.numel <= HARD_MAX_NUMEL, "claims ", h.numel,
       " coordinates, the receiver's limit max_numel is ", limits.max_numel);
  NEED(h.payload_bytes <= limits.max_payload_bytes && h.payload_bytes <= HARD_MAX_PAYLOAD,
       "claims a payload of ", h.payload_bytes,
       " bytes, the receiver's limit max_payload_bytes is ", limits.max_payload_bytes);
  return h;
}

Packet parse(const uint8_t* data, size_t size, const Limits& limits) {
  Packet packet;
  packet.data = data;
  packet.header = read_header(data, size, limits);
  const Header& h = packet.header;
  NEED(uint64_t(size) - uint64_t(HEADER_BYTES) == h.payload_bytes, "the header says ",
       h.payload_bytes + uint64_t(HEADER_BYTES), " bytes, the buffer holds ", size);
  const Sections sections = read_table(data, int64_t(size), h);
  packet.layout = check_lengths(sections, h, int64_t(size), limits);
  const Layout& layout = packet.layout;
  if (h.flags & CHECKSUM)
    NEED(checksum(data, size) == h.crc, "the checksum of the bytes differs from the header's");
  packet.starts = check_counts(data + layout.counts_at, layout);
  if (h.index == TILE16)
    check_tile16(data + layout.indices_at, layout, packet.starts);
  else
    check_bitmask(data + layout.indices_at, layout, packet.starts);
  const uint8_t* values = data + layout.values_at;
  NEED(h.value_dtype == F32   ? values_finite<uint32_t>(values, layout.k, 0x7f7fffff)
       : h.value_dtype == F16 ? values_finite<uint16_t>(values, layout.k, 0x7bff)
                              : values_finite<uint16_t>(values, layout.k, 0x7f7f),
       "a value is not finite");
  check_tensors(data + layout.tensors_at, layout);
  return packet;
}

// ---- writing ----------------------------------------------------------------------------------

Layout plan(int64_t numel, int64_t k, int index, int value_dtype, int64_t tensor_count) {
  Layout layout;
  layout.numel = numel;
  layout.k = k;
  layout.value_bytes = dtype_bytes(value_dtype);
  layout.tensor_count = tensor_count;
  layout.indices_bytes = index == TILE16 ? 2 * k : (numel + 7) / 8;
  const int sections = tensor_count ? 4 : 3;
  layout.counts_at = align_up(HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * sections);
  layout.indices_at = align_up(layout.counts_at + 4 * tiles(numel));
  layout.values_at = align_up(layout.indices_at + layout.indices_bytes);
  layout.total_bytes = layout.values_at + layout.value_bytes * k;
  if (tensor_count) {
    layout.tensors_at = align_up(layout.total_bytes);
    layout.total_bytes = layout.tensors_at + TENSOR_BYTES * tensor_count;
  }
  return layout;
}

void write_frame(const Layout& layout, const int64_t* starts, const uint8_t* tensors, Header h,
                 uint8_t* data) {
  h.payload_bytes = uint64_t(layout.total_bytes - HEADER_BYTES);
  std::memset(data, 0, size_t(HEADER_BYTES));
  std::memcpy(data, "FLCU", 4);
  data[4] = 1;
  put<uint16_t>(data + 6, uint16_t(HEADER_BYTES));
  put<uint16_t>(data + 8, SPARSE);
  put<uint32_t>(data + 12, h.flags | CHECKSUM);
  put<uint64_t>(data + 16, uint64_t(layout.numel));
  put<uint64_t>(data + 24, h.payload_bytes);
  put<uint64_t>(data + 32, h.round);
  put<uint64_t>(data + 40, h.seed);
  put<uint32_t>(data + 48, h.epoch);
  data[52] = h.source_dtype;
  data[53] = h.value_dtype;
  data[54] = h.index;
  data[55] = uint8_t(8 * layout.value_bytes);
  put<uint32_t>(data + 56, uint32_t(TILE));

  const struct {
    uint16_t type;
    int64_t offset, length;
  } sections[4] = {{COUNTS, layout.counts_at, 4 * tiles(layout.numel)},
                   {INDICES, layout.indices_at, layout.indices_bytes},
                   {VALUES, layout.values_at, layout.value_bytes * layout.k},
                   {TENSORS, layout.tensors_at, TENSOR_BYTES * layout.tensor_count}};
  const uint32_t count = layout.tensor_count ? 4 : 3;
  uint8_t* entry = data + HEADER_BYTES;
  put<uint32_t>(entry, count);
  put<uint32_t>(entry + 4, 0);
  entry += TABLE_BYTES;
  int64_t end = HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * int64_t(count);
  for (uint32_t i = 0; i < count; ++i, entry += ENTRY_BYTES) {
    const auto& section = sections[i];
    put<uint16_t>(entry, section.type);
    put<uint16_t>(entry + 2, 0);
    put<uint32_t>(entry + 4, uint32_t(element_bytes(section.type, h)));
    put<uint64_t>(entry + 8, uint64_t(section.offset));
    put<uint64_t>(entry + 16, uint64_t(section.length));
    std::memset(data + end, 0, size_t(section.offset - end));
    end = section.offset + section.length;
  }
  for (int64_t t = 0; t < tiles(layout.numel); ++t)
    put<uint32_t>(data + layout.counts_at + 4 * t, uint32_t(starts[t + 1] - starts[t]));
  if (layout.tensor_count)
    std::memcpy(data + layout.tensors_at, tensors, size_t(TENSOR_BYTES * layout.tensor_count));
}

void seal(uint8_t* data, size_t size) { put<uint32_t>(data + 60, checksum(data, size)); }

}  // namespace wire
}  // namespace flcore
