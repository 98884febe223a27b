// Rules of THC packets: codes of a table that all clients share, the table, and the norms they
// agreed on. Codes may be added as integers where all else of the packets is equal.
#include <cmath>
#include <cstring>

#include "rotation.h"
#include "wire_rules.h"

namespace flcore {
namespace wire {
namespace {

#define NEED FLCORE_NEED

constexpr float LARGEST_NORM = 0x1p120f, LARGEST_CLIP = 16.0f;  // |D| <= 2 clip norm

float float_at(const uint8_t* p) {
  const uint32_t bits = get<uint32_t>(p);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Codes of a packet: the last block is filled up to a power of two.
int64_t code_count(const Header& h) {
  const int64_t n = int64_t(h.numel), rest = n % h.tile;
  int64_t whole = rest ? 1 : 0;
  while (whole < rest) whole *= 2;
  return n - rest + whole;
}

void check_header(const Header& h) {
  NEED(h.value_dtype == F32, "value dtype ", int(h.value_dtype),
       " is not one that thc packets have");
  NEED(h.index <= 1, "form ", int(h.index), " is not one that thc packets have");
  NEED(h.bits == 2 || h.bits == 4, int(h.bits), " bits a code are not what a thc packet has");
  NEED(h.tile >= ROTATION_MIN_BLOCK && h.tile <= BLOCK_MAX && !(h.tile & (h.tile - 1)),
       "expected blocks of a power of two from ", ROTATION_MIN_BLOCK, " to ", BLOCK_MAX, ", got ",
       h.tile);
}

int64_t element_bytes(uint16_t type, const Header&) {
  return type == CODES ? 1 : type == CODEBOOK ? 2 : type == NORM ? 4 : 0;
}

void check_lengths(Packet& packet) {
  const Header& h = packet.header;
  packet.k = int64_t(h.numel);
  const auto check = [&](uint16_t type, const char* what, int64_t want) {
    const int64_t got = need_section(packet, type, what).length;
    NEED(got == want, "section type ", type, ": expected ", want, " bytes, got ", got);
  };
  check(NORM, "norm", 4 + 4 * (h.index ? 1 : buckets(h)));
  check(CODEBOOK, "codebook", 2 << h.bits);
  check(CODES, "codes", (code_count(h) * h.bits + 7) / 8);
}

void check_contents(Packet& packet) {
  const Header& h = packet.header;
  const uint8_t* norm = packet.section(NORM);
  const int64_t norms = packet.frame.length(NORM) / 4 - 1;
  const float clip = float_at(norm);
  NEED(clip >= 0x1p-10f && clip <= LARGEST_CLIP, "clip: expected 2^-10 to ", LARGEST_CLIP);
  for (int64_t i = 0; i < norms; ++i) {
    const float x = float_at(norm + 4 + 4 * i);
    NEED(!std::signbit(x) && x <= LARGEST_NORM, "norm ", i,
         ": it is negative, not finite, or too large");
  }
  const uint8_t* table = packet.section(CODEBOOK);
  const int last = (1 << h.bits) - 1;
  const auto at = [&](int k) { return int(get<uint16_t>(table + 2 * k)); };
  NEED(at(0) == 0 && at(last) <= THC_LARGEST, "codebook: expected values from 0 to at most ",
       THC_LARGEST);
  for (int k = 0; k < last; ++k) {
    NEED(at(k) < at(k + 1), "codebook: value ", k + 1, " is not above the one before");
    NEED(at(k) + at(last - k) == at(last), "codebook: value ", k, " has no mirror image");
  }
  const int64_t codes = code_count(h);
  const int used = int(codes * h.bits % 8);
  NEED(used == 0 || packet.section(CODES)[(codes * h.bits) / 8] >> used == 0,
       "a bit after the last code is set");
}

}  // namespace

const Rules THC_RULES = {"thc", &check_header, &element_bytes, &check_lengths, &check_contents};

}  // namespace wire
}  // namespace flcore
