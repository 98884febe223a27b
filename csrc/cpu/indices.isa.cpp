// Coordinates of a tile's entries as the gaps between them, in few bits (docs/packet.md).
//   gap_j = i_j - i_{j-1} - 1 within a tile of 65,536 coordinates, with i_{-1} = -1
//   bitpack  128 gaps share a width, the bits of their largest; little-endian
//   rice     gap >> b ones, a zero, the b low bits; most significant bit first; one b a tile
// At 1 % of the coordinates 9.6 and 8.1 bits an entry (the entropy bound is 8.08) where a 16-bit index
// takes 16. Writing reads the indices (2 B an entry) three to five times from cache; reading is one
// pass that also checks every bit, because the bytes are a stranger's. Tiles are independent: the
// same bytes for any number of threads and any level. Source: Rice, JPL 79-22, 1979; spec wire-format.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

FLCORE_INLINE int64_t tile_length(int64_t numel, int64_t tile) {
  const int64_t left = numel - tile * SPARSE_TILE;
  return left < SPARSE_TILE ? left : SPARSE_TILE;
}

FLCORE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// gaps[0 .. n) of entries j .. j + n - 1 of a tile
FLCORE_INLINE void gaps_of(const uint16_t* local, int64_t j, int64_t n, uint16_t* gaps) {
  gaps[0] = uint16_t(j ? local[j] - local[j - 1] - 1 : local[0]);
  for (int64_t i = 1; i < n; ++i) gaps[i] = uint16_t(local[j + i] - local[j + i - 1] - 1);
}

// ---- bitpack ----------------------------------------------------------------------------------

FLCORE_INLINE int64_t group_bytes(int64_t n, int width) { return (n * width + 7) / 8; }

static int64_t bitpack_measure(const uint16_t* local, int64_t n, uint8_t* widths) {
  uint16_t gaps[INDEX_GROUP];
  int64_t bytes = 0;
  for (int64_t j = 0; j < n; j += INDEX_GROUP) {
    const int64_t count = least(INDEX_GROUP, n - j);
    gaps_of(local, j, count, gaps);
    uint32_t any = 0;
    for (int64_t i = 0; i < count; ++i) any |= gaps[i];
    const int width = any ? 32 - __builtin_clz(any) : 0;
    *widths++ = uint8_t(width);
    bytes += group_bytes(count, width);
  }
  return bytes;
}

static void bitpack_encode(const uint16_t* local, int64_t n, const uint8_t* widths, uint8_t* out) {
  uint16_t gaps[INDEX_GROUP];
  for (int64_t j = 0; j < n; j += INDEX_GROUP) {
    const int64_t count = least(INDEX_GROUP, n - j);
    const int width = *widths++;
    gaps_of(local, j, count, gaps);
    uint64_t bits = 0;
    int held = 0;
    uint8_t* p = out;
    for (int64_t i = 0; i < count; ++i) {
      bits |= uint64_t(gaps[i]) << held;
      held += width;
      if (held >= 32) {
        store(p, uint32_t(bits));
        p += 4;
        bits >>= 32;
        held -= 32;
      }
    }
    for (; held > 0; held -= 8, bits >>= 8) *p++ = uint8_t(bits);
    out += group_bytes(count, width);
  }
}

// `room`: bytes that may be read from `in` on, at least those of the tile.
static int bitpack_decode(const uint8_t* in, int64_t room, int64_t n, const uint8_t* widths,
                          int64_t length, uint16_t* local) {
  int64_t next = 0;
  int fault = INDEX_FINE;
  for (int64_t j = 0; j < n; j += INDEX_GROUP) {
    const int64_t count = least(INDEX_GROUP, n - j);
    const int width = *widths++;
    const int64_t bytes = group_bytes(count, width);
    uint8_t padded[INDEX_GROUP * 2 + 8];
    const uint8_t* p = in;
    if (room < bytes + 4) {  // a load takes four bytes
      __builtin_memset(padded, 0, sizeof padded);
      __builtin_memcpy(padded, in, bytes);
      p = padded;
    }
    const uint32_t mask = (1u << width) - 1u;
    uint32_t any = 0;
    for (int64_t i = 0, bit = 0; i < count; ++i, bit += width) {
      const uint32_t gap = (load<uint32_t>(p + (bit >> 3)) >> (bit & 7)) & mask;
      any |= gap;
      local[j + i] = uint16_t(next + gap);
      next += int64_t(gap) + 1;
    }
    const int used = int(count * width & 7);
    if (fault == INDEX_FINE) {
      if (width && !(any >> (width - 1))) fault = INDEX_WIDE;
      if (used && in[bytes - 1] >> used) fault = INDEX_PADDING;
    }
    in += bytes;
    room -= bytes;
  }
  return fault == INDEX_FINE && next > length ? int(INDEX_BEYOND) : fault;
}

// ---- rice -------------------------------------------------------------------------------------

static int64_t shifted_sum(const uint16_t* local, int64_t n, int b) {
  uint32_t sum = uint32_t(local[0]) >> b;  // gaps sum to at most 65,535
  for (int64_t j = 1; j < n; ++j) sum += uint32_t(uint16_t(local[j] - local[j - 1] - 1)) >> b;
  return sum;
}

// Bits as a function of b are convex (a step saves the sum of ceil(g / 2), which falls with b), so a
// walk downhill ends at the least; of equal ones at the smallest b.
static int64_t rice_measure(const uint16_t* local, int64_t n, uint8_t* parameter) {
  *parameter = 0;
  if (n == 0) return 0;
  const auto bits = [&](int b) { return n * (1 + b) + shifted_sum(local, n, b); };
  const int64_t guess = (int64_t(local[n - 1]) + 1 - n) * 11 / (16 * n);  // 0.69 of the mean gap
  int b = guess ? 63 - __builtin_clzll(uint64_t(guess)) : 0;
  int64_t best = bits(b);
  bool down = false;
  while (b > 0) {
    const int64_t other = bits(b - 1);
    if (other > best) break;
    best = other;
    --b;
    down = true;
  }
  while (!down && b < RICE_PARAMETER_MAX) {
    const int64_t other = bits(b + 1);
    if (other >= best) break;
    best = other;
    ++b;
  }
  *parameter = uint8_t(b);
  return (best + 7) / 8;
}

struct BitWriter {  // most significant bit first
  uint8_t* out;
  uint64_t bits = 0;
  int held = 0;  // below 32

  FLCORE_MEMBER void put(uint32_t value, int count) {  // count <= 32
    bits = bits << count | value;
    held += count;
    if (held >= 32) {
      held -= 32;
      store(out, __builtin_bswap32(uint32_t(bits >> held)));
      out += 4;
    }
  }
  FLCORE_MEMBER void finish() {
    for (bits <<= 32 - held; held > 0; held -= 8, bits <<= 8) *out++ = uint8_t(bits >> 24);
  }
};

static void rice_encode(const uint16_t* local, int64_t n, int b, uint8_t* out) {
  BitWriter writer{out};
  const uint32_t mask = (1u << b) - 1u;
  int32_t next = 0;
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t gap = uint32_t(local[j] - next);
    next = local[j] + 1;
    uint32_t ones = gap >> b;
    for (; ones + 1 + uint32_t(b) > 32; ones -= least(ones, 31))
      writer.put((1u << least(ones, 31)) - 1u, int(least(ones, 31)));
    writer.put(((1u << ones) - 1u) << (b + 1) | (gap & mask), int(ones) + 1 + b);
  }
  writer.finish();
}

// 64 bits from a bit position on, at least 57 of them valid; zeros behind the end.
FLCORE_INLINE uint64_t window(const uint8_t* in, int64_t bytes, int64_t bit) {
  const int64_t at = bit >> 3;
  uint64_t word = 0;
  if (at + 8 <= bytes)
    word = load<uint64_t>(in + at);
  else if (at < bytes)
    __builtin_memcpy(&word, in + at, bytes - at);
  return __builtin_bswap64(word) << (bit & 7);
}

FLCORE_INLINE int leading_ones(uint64_t w) { return __builtin_clzll(~w | 1u); }  // at most 63

// A gap of any length; moves `bit` behind it. Ends because zeros follow the last byte.
static int64_t rice_long(const uint8_t* in, int64_t bytes, int b, int64_t& bit) {
  int64_t ones = 0;
  for (;;) {
    const int run = leading_ones(window(in, bytes, bit));
    if (run < 56) {
      ones += run;
      bit += run + 1;
      break;
    }
    ones += 56;
    bit += 56;
  }
  const uint64_t low = window(in, bytes, bit) >> 1 >> (63 - b);
  bit += b;
  return (ones << b) + int64_t(low);
}

static int rice_decode(const uint8_t* in, int64_t bytes, int64_t n, int b, int64_t length,
                       uint16_t* local) {
  constexpr int VALID = 57;
  int64_t next = 0, bit = 0, j = 0;
  while (j < n) {
    uint64_t w = window(in, bytes, bit);
    int used = 0;
    for (; j < n; ++j) {
      const int ones = leading_ones(w), size = ones + 1 + b;
      if (used + size > VALID) break;
      const uint64_t rest = w << ones << 1;
      next += (int64_t(ones) << b) + int64_t(rest >> 1 >> (63 - b));
      local[j] = uint16_t(next++);
      w = rest << b;
      used += size;
    }
    bit += used;
    if (used == 0) {
      next += rice_long(in, bytes, b, bit);
      local[j++] = uint16_t(next++);
    }
  }
  if ((bit + 7) / 8 != bytes) return INDEX_LENGTH;
  if ((bit & 7) && uint8_t(in[bytes - 1] << (bit & 7))) return INDEX_PADDING;
  return next > length ? int(INDEX_BEYOND) : int(INDEX_FINE);
}

// ---- table ------------------------------------------------------------------------------------

int64_t tile_count(const IndexArgs& x) { return (x.numel + SPARSE_TILE - 1) / SPARSE_TILE; }

// Where the parameters of a tile begin.
FLCORE_INLINE uint8_t* parameters_of(const IndexArgs& x, int64_t tile) {
  return x.parameters + (x.coding == INDEX_RICE ? tile : x.groups[tile]);
}

void measure(const IndexArgs& x, const uint16_t* local, int64_t* bytes) {
  for_chunks(tile_count(x), x.threads, [&](int64_t t) {
    const uint16_t* entries = local + x.starts[t];
    const int64_t n = x.starts[t + 1] - x.starts[t];
    bytes[t] = x.coding == INDEX_RICE ? rice_measure(entries, n, parameters_of(x, t))
                                      : bitpack_measure(entries, n, parameters_of(x, t));
  });
}

void encode(const IndexArgs& x, const uint16_t* local, uint8_t* section) {
  for_chunks(tile_count(x), x.threads, [&](int64_t t) {
    const uint16_t* entries = local + x.starts[t];
    const int64_t n = x.starts[t + 1] - x.starts[t];
    if (x.coding == INDEX_RICE)
      rice_encode(entries, n, *parameters_of(x, t), section + x.at[t]);
    else
      bitpack_encode(entries, n, parameters_of(x, t), section + x.at[t]);
  });
}

IndexFault decode(const IndexArgs& x, const uint8_t* section, uint16_t* local) {
  const int64_t tiles = tile_count(x);
  int64_t first = tiles * INDEX_FAULTS;  // the first tile with a fault, and its fault
  for_chunks(tiles, x.threads, [&](int64_t t) {
    uint16_t* entries = local + x.starts[t];
    const int64_t n = x.starts[t + 1] - x.starts[t], bytes = x.at[t + 1] - x.at[t];
    const int64_t length = tile_length(x.numel, t);
    const uint8_t* in = section + x.at[t];
    const int fault =
        x.coding == INDEX_RICE
            ? rice_decode(in, bytes, n, *parameters_of(x, t), length, entries)
            : bitpack_decode(in, x.at[tiles] - x.at[t], n, parameters_of(x, t), length, entries);
    if (fault == INDEX_FINE) return;
    const int64_t found = t * INDEX_FAULTS + fault;
    int64_t known = __atomic_load_n(&first, __ATOMIC_RELAXED);
    while (found < known && !__atomic_compare_exchange_n(&first, &known, found, true,
                                                         __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  });
  return {first / INDEX_FAULTS, int(first % INDEX_FAULTS)};
}

}  // namespace
}  // namespace FLCORE_ISA

extern const IndicesFns FLCORE_TABLE(indices);
const IndicesFns FLCORE_TABLE(indices) = {&FLCORE_ISA::measure, &FLCORE_ISA::encode,
                                          &FLCORE_ISA::decode};

}  // namespace flcore
