// Rules of sketch packets: one table of `form` rows and `tile` columns.
#include "wire_rules.h"

namespace flcore {
namespace wire {
namespace {

#define NEED FLCORE_NEED

void check_header(const Header& h) {
  NEED(h.value_dtype == F32, "value dtype: expected 1 (float32), got ", int(h.value_dtype));
  NEED(h.index % 2 == 1 && h.index <= SKETCH_ROWS, "expected 1, 3, 5, 7 or 9 rows, got ",
       int(h.index));
  NEED(h.bits == 32, "expected 32 bits a value, got ", int(h.bits));
  NEED(h.tile >= 1, "expected at least one column");
  NEED(h.numel <= uint64_t(PHILOX_LENGTH), "claims ", h.numel,
       " coordinates, a sketch has at most 2^34");
}

int64_t element_bytes(uint16_t type, const Header&) { return type == VALUES ? 4 : 0; }

void check_lengths(Packet& packet) {
  const Header& h = packet.header;
  packet.k = int64_t(h.index) * int64_t(h.tile);
  const Section& table = need_section(packet, VALUES, "table");
  NEED(table.length == 4 * packet.k, "section type 5: expected ", 4 * packet.k, " bytes for ",
       int(h.index), " rows of ", h.tile, " columns, got ", table.length);
}

void check_contents(Packet& packet) {
  NEED(values_finite(packet.section(VALUES), packet.k, F32), "a value is not finite");
}

}  // namespace

const Rules SKETCH_RULES = {"sketch", &check_header, &element_bytes, &check_lengths,
                            &check_contents};

}  // namespace wire
}  // namespace flcore
