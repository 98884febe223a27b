// Reader and writer of the frame of packet version 1. Fields are read and written one by one in
// little-endian order, so neither the host's byte order nor struct padding can reach the wire.
#include "wire.h"

#include <cstring>
#include <string>

#include "api.h"
#include "check.h"
#include "wire_rules.h"

namespace flcore {
namespace wire {
namespace {

#define NEED FLCORE_NEED

constexpr uint32_t KNOWN_FLAGS = CHECKSUM | NONFINITE | RESYNC | INCREMENT;

const Rules* rules_of(int codec) {
  if (codec == CODEC_SPARSE) return &SPARSE_RULES;
  if (codec == CODEC_LOW_RANK) return &LOW_RANK_RULES;
  if (codec == CODEC_SKETCH) return &SKETCH_RULES;
  if (codec == CODEC_THC) return &THC_RULES;
  if (codec < 0 || codec >= CODEC_COUNT || !BUCKET_RULES[codec].name) return nullptr;
  return &BUCKET_RULES[codec];
}

std::string codec_name(int codec) {
  return text("codec ", codec, " (", rules_of(codec)->name, ")");
}

std::string known_codecs() {
  std::string known;
  for (int c = 0; c < CODEC_COUNT; ++c)
    if (const Rules* rules = rules_of(c))
      known += text(known.empty() ? "" : ", ", c, " (", rules->name, ")");
  return known;
}

int64_t align_up(int64_t offset) { return (offset + ALIGN - 1) / ALIGN * ALIGN; }

// Of the packet with its CRC field as zero.
uint32_t checksum(const uint8_t* data, size_t size, int threads) {
  const uint8_t zero[4] = {0, 0, 0, 0};
  const auto crc = cpu().crc32c->update;
  const uint32_t header = crc(crc(0, data, 60, 1), zero, 4, 1);
  return crc(header, data + HEADER_BYTES, int64_t(size) - HEADER_BYTES, threads);
}

// All sections lie inside the buffer, aligned, one after another, with zero padding between them.
Frame read_table(const uint8_t* data, int64_t size, const Header& h) {
  NEED(size >= HEADER_BYTES + TABLE_BYTES, "no room for a section table in ", size, " bytes");
  const int64_t count = get<uint32_t>(data + HEADER_BYTES);
  NEED(get<uint32_t>(data + HEADER_BYTES + 4) == 0,
       "the reserved word of the section table is not zero");
  const int64_t room = (size - HEADER_BYTES - TABLE_BYTES) / ENTRY_BYTES;
  NEED(count <= room, "claims ", count, " sections, there is room for ", room);
  const Rules& rules = *rules_of(h.codec);
  Frame found;
  found.header = h;
  found.total_bytes = size;
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
      const int64_t want = type == TENSORS ? TENSOR_BYTES : rules.element(type, h);
      NEED(want, "section type ", type, " is unknown for ", codec_name(h.codec));
      NEED(!found.find(type), "section type ", type, " appears twice");  // so there are few
      NEED(flags == 0, "section ", i, " (type ", type, "): unknown flags ", flags);
      NEED(element == want, "section ", i, " (type ", type, "): expected elements of ", want,
           " bytes, got ", element);
      found.sections.push_back({type, element, start, int64_t(length)});
    }
    end = start + int64_t(length);
  }
  NEED(end == size, "the sections end at byte ", end, ", the packet at ", size);
  for (const Section& s : found.sections)
    NEED(s.length % s.element == 0, "section type ", s.type, ": ", s.length,
         " bytes are no multiple of ", s.element);
  return found;
}

// Consecutive tensors that cover all coordinates.
void check_tensors(const uint8_t* table, int64_t tensors, int64_t numel) {
  int64_t end = 0;
  for (int64_t i = 0; i < tensors; ++i) {
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
    NEED(count <= uint64_t(numel - end), "tensor ", i, " ends beyond coordinate ", numel);
    end += int64_t(count);
  }
  NEED(tensors == 0 || end == numel, "the tensor table covers ", end, " of ", numel,
       " coordinates");
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
  NEED(rules_of(codec), "codec: expected ", known_codecs(), ", got ", codec);
  NEED(revision == 0, "expected revision 0 of ", codec_name(codec), ", got ", revision);
  Header h;
  h.codec = uint16_t(codec);
  h.flags = get<uint32_t>(data + 12);
  h.numel = get<uint64_t>(data + 16);
  h.payload_bytes = get<uint64_t>(data + 24);
  h.round = get<uint64_t>(data + 32);
  h.seed = get<uint64_t>(data + 40);
  h.epoch = get<uint32_t>(data + 48);
  h.source_dtype = data[52];
  h.value_dtype = data[53];
  h.index = data[54];
  h.bits = data[55];
  h.tile = get<uint32_t>(data + 56);
  h.crc = get<uint32_t>(data + 60);
  NEED((h.flags & ~KNOWN_FLAGS) == 0, "flags ", h.flags, " hold bits unknown for ",
       codec_name(codec));
  NEED((h.flags & CHECKSUM) || h.crc == 0, "the checksum field is set but its flag is not");
  NEED(h.value_dtype > F64 && h.value_dtype <= WIRE_E8M0, "value dtype: expected ",
       "1 (float32), 2 (float16), 3 (bfloat16), 4 (int8), 5 (e8m0), got ", int(h.value_dtype));
  NEED(h.source_dtype < DTYPE_COUNT, "source dtype: expected 0 (float64), 1 (float32), ",
       "2 (float16), 3 (bfloat16), got ", int(h.source_dtype));
  rules_of(codec)->header(h);
  NEED(h.numel <= limits.max_numel && h.numel <= HARD_MAX_NUMEL, "claims ", h.numel,
       " coordinates, the receiver's limit max_numel is ", limits.max_numel);
  NEED(h.payload_bytes <= limits.max_payload_bytes && h.payload_bytes <= HARD_MAX_PAYLOAD,
       "claims a payload of ", h.payload_bytes,
       " bytes, the receiver's limit max_payload_bytes is ", limits.max_payload_bytes);
  return h;
}

Packet parse(const uint8_t* data, size_t size, const Limits& limits, int threads) {
  Packet packet;
  packet.data = data;
  packet.threads = threads;
  packet.header = read_header(data, size, limits);
  const Header& h = packet.header;
  NEED(uint64_t(size) - uint64_t(HEADER_BYTES) == h.payload_bytes, "the header says ",
       h.payload_bytes + uint64_t(HEADER_BYTES), " bytes, the buffer holds ", size);
  packet.frame = read_table(data, int64_t(size), h);
  const Rules& rules = *rules_of(h.codec);
  const int64_t table = packet.frame.length(TENSORS), tensors = table / TENSOR_BYTES;
  NEED(uint64_t(tensors) <= limits.max_tensors, tensors,
       " tensors, the receiver's limit max_tensors is ", limits.max_tensors);
  const int64_t payload = int64_t(size) - HEADER_BYTES;
  const int64_t allowed = 8 * int64_t(h.numel) + SLACK_BYTES + table;
  NEED(payload <= allowed, "a payload of ", payload, " bytes for ", h.numel,
       " coordinates, at most ", allowed);
  rules.lengths(packet);
  if (h.flags & CHECKSUM)
    NEED(checksum(data, size, threads) == h.crc,
         "the checksum of the bytes differs from the header's");
  check_tensors(packet.section(TENSORS), tensors, int64_t(h.numel));
  rules.contents(packet);
  return packet;
}

PacketView Packet::view(double weight) const {
  const auto at = [&](uint16_t type) { return frame.find(type) ? section(type) : nullptr; };
  PacketView v = {};
  v.codec = header.codec;
  v.form = header.index;
  v.bits = header.bits;
  v.value_dtype = header.value_dtype;
  v.weight = weight;
  v.numel = int64_t(header.numel);
  v.bucket = header.tile;
  v.seed = header.seed;
  v.round = header.round;
  v.k = k;
  v.scales = at(SCALES);
  v.codes = at(CODES);
  v.scale_stride = scales_per_bucket(header.codec) * value_bytes(header.value_dtype);
  v.code_stride = bucket_code_bytes(header, header.tile);
  v.codebook = at(CODEBOOK);
  v.norm = at(NORM);
  v.indices = local.empty() ? at(INDICES) : reinterpret_cast<const uint8_t*>(local.data());
  v.values = at(VALUES);
  v.starts = starts.data();
  v.bitmask = header.codec == CODEC_SPARSE && header.index == BITMASK;
  v.factor_p = at(FACTOR_P);
  v.factor_q = at(FACTOR_Q);
  v.matrices = matrices.data();
  v.matrix_count = int64_t(matrices.size());
  return v;
}

// ---- writing ----------------------------------------------------------------------------------

Frame plan(const Header& header, std::vector<Section> sections, int64_t tensor_count) {
  Frame frame;
  if (tensor_count)
    sections.push_back({TENSORS, uint32_t(TENSOR_BYTES), 0, TENSOR_BYTES * tensor_count});
  int64_t end = HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * int64_t(sections.size());
  for (Section& section : sections) {
    section.offset = align_up(end);
    end = section.offset + section.length;
  }
  frame.header = header;
  frame.header.payload_bytes = uint64_t(end - HEADER_BYTES);
  frame.sections = std::move(sections);
  frame.total_bytes = end;
  return frame;
}

void write_frame(const Frame& frame, const uint8_t* tensors, uint8_t* data) {
  const Header& h = frame.header;
  std::memset(data, 0, size_t(HEADER_BYTES));
  std::memcpy(data, "FLCU", 4);
  data[4] = 1;
  put<uint16_t>(data + 6, uint16_t(HEADER_BYTES));
  put<uint16_t>(data + 8, h.codec);
  put<uint32_t>(data + 12, h.flags | CHECKSUM);
  put<uint64_t>(data + 16, h.numel);
  put<uint64_t>(data + 24, h.payload_bytes);
  put<uint64_t>(data + 32, h.round);
  put<uint64_t>(data + 40, h.seed);
  put<uint32_t>(data + 48, h.epoch);
  data[52] = h.source_dtype;
  data[53] = h.value_dtype;
  data[54] = h.index;
  data[55] = h.bits;
  put<uint32_t>(data + 56, h.tile);
  uint8_t* entry = data + HEADER_BYTES;
  put<uint32_t>(entry, uint32_t(frame.sections.size()));
  put<uint32_t>(entry + 4, 0);
  entry += TABLE_BYTES;
  int64_t end = HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * int64_t(frame.sections.size());
  for (const Section& section : frame.sections) {
    put<uint16_t>(entry, section.type);
    put<uint16_t>(entry + 2, 0);
    put<uint32_t>(entry + 4, section.element);
    put<uint64_t>(entry + 8, uint64_t(section.offset));
    put<uint64_t>(entry + 16, uint64_t(section.length));
    entry += ENTRY_BYTES;
    std::memset(data + end, 0, size_t(section.offset - end));
    end = section.offset + section.length;
  }
  if (const Section* table = frame.find(TENSORS))
    std::memcpy(data + table->offset, tensors, size_t(table->length));
}

void seal(uint8_t* data, size_t size, int threads) {
  put<uint32_t>(data + 60, checksum(data, size, threads));
}

}  // namespace wire
}  // namespace flcore
