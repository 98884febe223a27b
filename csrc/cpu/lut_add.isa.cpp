// The server's side of THC codes (cpu/codes_thc.h), without floating point until the end, and the
// norms that clients exchange before they encode.
//   add     sums[j] = sum_i table_i[code j of packet i]
//           n bits / 8 bytes read a coordinate, 1, 2 or 4 written. A byte shuffle looks 16 or 32
//           codes up at once; packets whose sum still fits in a byte are added in bytes, in
//           registers, and only such a group is added to wider lanes, in a tile that stays in L1.
//   decode  out = S Had(2 sums - top) t l / (g m total): one transform, of integers, exact, for all
//           packets; lane_bytes read and 4 bytes written a coordinate, 2 log2 m additions.
//   norms   sum of the squares of u in every block, in float64: 16 lanes (coordinate i of the block
//           in lane i % 16), then a fixed tree. Reads update and state once, writes none of them.
// The same bits for every level and thread count.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/feedback.h"
#include "cpu/hadamard.h"
#include "cpu/layers.h"
#include "cpu/thc_grid.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

// ---- add ---------------------------------------------------------------------------------------

constexpr int64_t TILE = 16384;  // codes: 8 KiB of each packet at 4 bits

#if defined(__AVX2__)
typedef __m256i Bytes;
FLCORE_INLINE Bytes spread_table(const uint8_t* t) {
  return _mm256_broadcastsi128_si256(load<__m128i>(t));
}
FLCORE_INLINE Bytes shuffle(const Bytes& t, const Bytes& x) { return _mm256_shuffle_epi8(t, x); }
FLCORE_INLINE Bytes keep(const Bytes& x, int mask) {
  return _mm256_and_si256(x, _mm256_set1_epi8(char(mask)));
}
FLCORE_INLINE Bytes shift(const Bytes& x, int by) { return _mm256_srli_epi16(x, by); }
FLCORE_INLINE Bytes sum(const Bytes& x, const Bytes& y) { return _mm256_add_epi8(x, y); }
// x0 y0 x1 y1 ..
FLCORE_INLINE void zip(const Bytes& x, const Bytes& y, Bytes& first, Bytes& second) {
  const Bytes a = _mm256_unpacklo_epi8(x, y), b = _mm256_unpackhi_epi8(x, y);
  first = _mm256_permute2x128_si256(a, b, 0x20);
  second = _mm256_permute2x128_si256(a, b, 0x31);
}
#elif defined(__SSSE3__)
typedef __m128i Bytes;
FLCORE_INLINE Bytes spread_table(const uint8_t* t) { return load<__m128i>(t); }
FLCORE_INLINE Bytes shuffle(const Bytes& t, const Bytes& x) { return _mm_shuffle_epi8(t, x); }
FLCORE_INLINE Bytes keep(const Bytes& x, int mask) {
  return _mm_and_si128(x, _mm_set1_epi8(char(mask)));
}
FLCORE_INLINE Bytes shift(const Bytes& x, int by) { return _mm_srli_epi16(x, by); }
FLCORE_INLINE Bytes sum(const Bytes& x, const Bytes& y) { return _mm_add_epi8(x, y); }
FLCORE_INLINE void zip(const Bytes& x, const Bytes& y, Bytes& first, Bytes& second) {
  const Bytes a = _mm_unpacklo_epi8(x, y), b = _mm_unpackhi_epi8(x, y);  // may be the same memory
  first = a;
  second = b;
}
#endif

// out[j] = sum of table_i[code begin + j] over packets [from, to), 0 <= j < count; begin is a
// multiple of TILE and the sums fit in bytes
template <int BITS>
static void add_bytes(const LutAddArgs& x, int64_t from, int64_t to, int64_t begin, int64_t count,
                      uint8_t* out) {
  constexpr int EACH = 8 / BITS;  // codes of a byte
  const int64_t offset = begin / EACH;
  int64_t j = 0;
#if defined(__SSSE3__)
  constexpr int64_t WIDE = int64_t(sizeof(Bytes)), STEP = WIDE * EACH;
  for (; j + STEP <= count; j += STEP) {
    Bytes acc[EACH] = {};
    for (int64_t i = from; i < to; ++i) {
      const Bytes t = spread_table(x.tables + 16 * i);
      const Bytes v = load<Bytes>(x.packets[i] + offset + j / EACH);
#pragma GCC unroll 4
      for (int k = 0; k < EACH; ++k)
        acc[k] = sum(acc[k], shuffle(t, keep(k ? shift(v, k * BITS) : v, (1 << BITS) - 1)));
    }
    if constexpr (EACH == 2) {
      zip(acc[0], acc[1], acc[0], acc[1]);
    } else {
      Bytes even[2], odd[2];  // codes 0 2 0 2 .. and 1 3 1 3 ..
      zip(acc[0], acc[2], even[0], even[1]);
      zip(acc[1], acc[3], odd[0], odd[1]);
      zip(even[0], odd[0], acc[0], acc[1]);
      zip(even[1], odd[1], acc[2], acc[3]);
    }
#pragma GCC unroll 4
    for (int k = 0; k < EACH; ++k) store(out + j + k * WIDE, acc[k]);
  }
#endif
  for (; j < count; ++j) {
    uint8_t total = 0;
    for (int64_t i = from; i < to; ++i) {
      const int byte = x.packets[i][offset + j / EACH];
      total = uint8_t(total + x.tables[16 * i + ((byte >> (j % EACH * BITS)) & ((1 << BITS) - 1))]);
    }
    out[j] = total;
  }
}

template <class Lane>
static void widen(const uint8_t* bytes, int64_t count, bool fresh, Lane* sums) {
  if (fresh)
    for (int64_t j = 0; j < count; ++j) sums[j] = bytes[j];
  else
    for (int64_t j = 0; j < count; ++j) sums[j] = Lane(sums[j] + bytes[j]);
}

template <int BITS, class Lane>
static void add_tile(const LutAddArgs& x, int64_t begin, int64_t count) {
  uint8_t bytes[TILE];
  Lane sums[sizeof(Lane) == 1 ? 1 : TILE];
  uint8_t* out = static_cast<uint8_t*>(x.sums) + int64_t(sizeof(Lane)) * begin;
  for (int64_t from = 0; from < x.n || from == 0;) {
    int room = 255;
    int64_t to = from;
    for (; to < x.n; ++to) {
      const int most = x.tables[16 * to + (1 << BITS) - 1];
      if (most > room) break;
      room -= most;
    }
    if constexpr (sizeof(Lane) == 1) {
      add_bytes<BITS>(x, 0, x.n, begin, count, out);
      return;
    }
    add_bytes<BITS>(x, from, to, begin, count, bytes);
    widen(bytes, count, from == 0, sums);
    if (to == x.n) break;
    from = to;
  }
  __builtin_memcpy(out, sums, size_t(count) * sizeof(Lane));
}

template <int BITS>
static void add_tile(const LutAddArgs& x, int64_t begin, int64_t count) {
  if (x.lane_bytes == 1) add_tile<BITS, uint8_t>(x, begin, count);
  if (x.lane_bytes == 2) add_tile<BITS, uint16_t>(x, begin, count);
  if (x.lane_bytes == 4) add_tile<BITS, uint32_t>(x, begin, count);
}

void add(const LutAddArgs& x) {
  for_chunks((x.codes + TILE - 1) / TILE, x.threads, [&](int64_t tile) {
    const int64_t begin = tile * TILE, left = x.codes - begin;
    const int64_t count = left < TILE ? left : TILE;
    if (x.bits == 2)
      add_tile<2>(x, begin, count);
    else
      add_tile<4>(x, begin, count);
  });
}

// ---- decode ------------------------------------------------------------------------------------

template <class Lane>
static void centre(const char* sums, int64_t m, int32_t top, int32_t* y) {
  for (int64_t i = 0; i < m; ++i)
    y[i] = int32_t(2 * uint32_t(load<Lane>(sums + i * int64_t(sizeof(Lane))))) - top;
}

static void decode_block(const LutDecodeArgs& x, int64_t block) {
  const int64_t first = block * x.block, left = x.numel - first;
  const int64_t n = left < x.block ? left : x.block, m = hadamard_size(n);
  const float norm = x.norms[x.shared ? 0 : block];
  float* out = x.out + first;
  if (!(norm > 0)) {
    __builtin_memset(out, 0, size_t(n) * 4);
    return;
  }
  alignas(64) int32_t y[HADAMARD_MAX];
  const char* sums = static_cast<const char*>(x.sums) + first * x.lane_bytes;
  if (x.lane_bytes == 1) centre<uint8_t>(sums, m, int32_t(x.top), y);
  if (x.lane_bytes == 2) centre<uint16_t>(sums, m, int32_t(x.top), y);
  if (x.lane_bytes == 4) centre<uint32_t>(sums, m, int32_t(x.top), y);
  hadamard(y, m);
  HadamardSigns signs;
  signs.make(x.rotation, first, m);
  const float down = float(thc_down(norm, x.clip, x.g, m, x.shared ? x.numel : m) / x.total);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    store(out + i, signs.many(i, down * __builtin_convertvector(load<vi32>(y + i), vf32)));
  for (; i < n; ++i) out[i] = signs.one(i, down * float(y[i]));
}

void decode(const LutDecodeArgs& x) {
  for_chunks((x.numel + x.block - 1) / x.block, x.threads,
             [&](int64_t block) { decode_block(x, block); });
}

// ---- norms -------------------------------------------------------------------------------------

static double square_sum(const float* u, int64_t n) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; k += LANES64) {
      const vf64 x = __builtin_convertvector(load<vf32h>(u + i + k), vf64);
      store(lanes + k, load<vf64>(lanes + k) + x * x);
    }
  for (; i < n; ++i) {
    const double x = load<float>(u + i);
    lanes[i & 15] += x * x;
  }
  for (int s = 8; s > 0; s /= 2)
    for (int k = 0; k < s; ++k) lanes[k] += lanes[k + s];
  return lanes[0];
}

bool norms(const BlockNormArgs& x) {
  (void)&feedback_store;  // of the same header; state is only read here
  const FeedbackArgs& f = x.feedback;
  const int64_t blocks = (f.numel + x.block - 1) / x.block;
  int32_t bad = 0;
  for_ranges(blocks, f.threads, [&](int64_t part, int64_t block, int64_t end) {
    if (block == end) return;
    int64_t layer = find_layer(f.starts, f.layers, block * x.block);
    const FeedbackBuffers buffers =
        feedback_buffers(x.scratch + part * FEEDBACK_PARTS * x.block, x.block);
    for (; block < end; ++block) {
      const int64_t begin = block * x.block, left = f.numel - begin;
      const int64_t n = left < x.block ? left : x.block;
      const FeedbackBlock b = feedback_load(f, begin, n, layer, buffers);
      if (!b.finite) {
        __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        return;
      }
      x.squares[block] = square_sum(b.u, n);
    }
  });
  return bad == 0;
}

}  // namespace
}  // namespace FLCORE_ISA

extern const LutAddFns FLCORE_TABLE(lut_add);
const LutAddFns FLCORE_TABLE(lut_add) = {&FLCORE_ISA::add, &FLCORE_ISA::decode,
                                         &FLCORE_ISA::norms};

}  // namespace flcore
