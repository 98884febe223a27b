// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), the checksum of packets.
//   update(crc, data, bytes, threads): the sum over what came before and data; starts from 0
// Reads the data once, long inputs in one part a thread: the sum over two strings follows from the sum
// over each and the length of the second. The SSE4.2 instruction takes 8 bytes but 3 cycles of
// latency, so long parts run as three independent streams of LANE bytes; the sums are joined with a
// table that advances a CRC over LANE zero bytes (a linear map of its 32 bits). Elsewhere: one table
// look-up a byte.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr uint32_t POLYNOMIAL = 0x82F63B78u;

struct ByteTable {
  uint32_t at[256];
};

constexpr ByteTable make_byte_table() {
  ByteTable table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1u ? POLYNOMIAL : 0u);
    table.at[byte] = crc;
  }
  return table;
}

constexpr ByteTable BYTES = make_byte_table();

FLCORE_INLINE uint32_t add_byte(uint32_t crc, uint8_t byte) {
#if defined(__SSE4_2__)
  return __builtin_ia32_crc32qi(crc, byte);
#else
  return BYTES.at[(crc ^ byte) & 0xffu] ^ (crc >> 8);
#endif
}

#if defined(__SSE4_2__)
constexpr int64_t LANE = 4096;

struct ShiftTable {
  uint32_t at[4][256];
};

constexpr ShiftTable make_shift_table() {
  uint32_t basis[32] = {};
  for (int bit = 0; bit < 32; ++bit) {
    uint32_t crc = uint32_t(1) << bit;
    for (int64_t i = 0; i < LANE; ++i) crc = BYTES.at[crc & 0xffu] ^ (crc >> 8);
    basis[bit] = crc;
  }
  ShiftTable table{};
  for (int part = 0; part < 4; ++part)
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) table.at[part][byte] ^= basis[8 * part + bit];
  return table;
}

constexpr ShiftTable SHIFT = make_shift_table();

FLCORE_INLINE uint64_t shift_lane(uint64_t crc) {
  return SHIFT.at[0][crc & 0xff] ^ SHIFT.at[1][crc >> 8 & 0xff] ^ SHIFT.at[2][crc >> 16 & 0xff] ^
         SHIFT.at[3][crc >> 24 & 0xff];
}

FLCORE_INLINE uint64_t add_word(uint64_t crc, const uint8_t* p) {
  uint64_t word;
  __builtin_memcpy(&word, p, 8);
  return __builtin_ia32_crc32di(crc, word);
}
#endif

static uint32_t sum(uint32_t seed, const uint8_t* p, int64_t bytes) {
  uint32_t crc = ~seed;
#if defined(__SSE4_2__)
  for (; bytes >= 3 * LANE; bytes -= 3 * LANE, p += 3 * LANE) {
    uint64_t first = crc, second = 0, third = 0;
    for (int64_t i = 0; i < LANE; i += 8) {
      first = add_word(first, p + i);
      second = add_word(second, p + LANE + i);
      third = add_word(third, p + 2 * LANE + i);
    }
    crc = uint32_t(shift_lane(shift_lane(first) ^ second) ^ third);
  }
  for (; bytes >= 8; bytes -= 8, p += 8) crc = uint32_t(add_word(crc, p));
#endif
  for (; bytes > 0; --bytes, ++p) crc = add_byte(crc, *p);
  return ~crc;
}

// ---- sums of parts --------------------------------------------------------------------------------

constexpr int MAX_PARTS = 64;
constexpr int64_t PART = 1 << 18;  // bytes worth a thread: ten times what starting one takes

// Product of polynomials modulo the sum's; the top bit is the coefficient of x^0.
static uint32_t product(uint32_t a, uint32_t b) {
  uint32_t p = 0;
  for (int bit = 31; bit >= 0; --bit) {
    if (a >> bit & 1u) p ^= b;
    b = (b >> 1) ^ (b & 1u ? POLYNOMIAL : 0u);
  }
  return p;
}

// The sum over a string, after `bytes` zeros more: times x^(8 bytes).
static uint32_t advance(uint32_t crc, int64_t bytes) {
  uint32_t power = uint32_t(1) << 23;  // x^8
  for (; bytes; bytes /= 2) {
    if (bytes & 1) crc = product(crc, power);
    power = product(power, power);
  }
  return crc;
}

uint32_t update(uint32_t seed, const uint8_t* data, int64_t bytes, int threads) {
  int64_t parts = bytes / PART < threads ? bytes / PART : threads;
  if (parts > MAX_PARTS) parts = MAX_PARTS;
  if (parts < 2) return sum(seed, data, bytes);
  uint32_t sums[MAX_PARTS];
  for_chunks(parts, int(parts), [&](int64_t i) {
    const int64_t begin = bytes * i / parts, end = bytes * (i + 1) / parts;
    sums[i] = sum(i ? 0 : seed, data + begin, end - begin);
  });
  uint32_t crc = sums[0];
  for (int64_t i = 1; i < parts; ++i)
    crc = advance(crc, bytes * (i + 1) / parts - bytes * i / parts) ^ sums[i];
  return crc;
}

}  // namespace
}  // namespace FLCORE_ISA

extern const Crc32cFns FLCORE_TABLE(crc32c);
const Crc32cFns FLCORE_TABLE(crc32c) = {&FLCORE_ISA::update};

}  // namespace flcore
