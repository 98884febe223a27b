// The inner kernel of qmatmul_int8: R rows of x against a panel of PANEL_BLOCKS blocks of 16 rows
// of W, all of k, accumulators in registers. A vector of codes is used R times, a broadcast dword
// of x PANEL_VECTORS times. Codes of less than 8 bits are taken apart in registers, or come from a
// panel that was decoded to bytes before.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/fma.h"
#include "cpu/int_dot.h"
#include "cpu/int_lanes.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int PARTS = 64 / VEC_BYTES;  // vectors of a block
#if defined(__AVX512F__)
constexpr int PANEL_BLOCKS = 2, TILE_ROWS = HAS_VNNI ? 12 : 8;
#elif defined(__AVX2__)
constexpr int PANEL_BLOCKS = 1, TILE_ROWS = 4;
#else
constexpr int PANEL_BLOCKS = 1, TILE_ROWS = 2;
#endif
constexpr int PANEL_VECTORS = PANEL_BLOCKS * PARTS;
constexpr int PANEL_ROWS = 16 * PANEL_BLOCKS;
constexpr int64_t UNIT = 16;           // k that codes are visited by: half a chunk
constexpr int64_t AHEAD_PACKED = 4096, AHEAD_BYTES = 2048;  // of codes that are prefetched

// k cut into blocks of one scale of x and one of W, summed in integers: at most LONGEST positions,
// for which 255 * 255 * LONGEST is an int32.
constexpr int64_t LONGEST = 1 << 15;

struct Blocks {
  int64_t k, act, group;         // act, group: k positions that share a scale of x and of W
  int64_t base, pieces, length;  // the shorter of both, cut into pieces
  int64_t count;

  FLCORE_MEMBER int64_t first(int64_t b) const {
    const int64_t at = b / pieces * base + b % pieces * length;
    return at < k ? at : k;
  }
  FLCORE_MEMBER int64_t last(int64_t b) const {
    const int64_t end = (b / pieces + 1) * base, stop = first(b) + length;
    const int64_t least = stop < end ? stop : end;
    return least < k ? least : k;
  }
};

FLCORE_INLINE Blocks blocks_of(const QWeight& w, int64_t act_block) {
  Blocks b = {};
  b.k = w.k;
  b.act = act_block <= 0 || act_block > w.k ? w.k : act_block;
  b.group = w.group > w.k ? w.k : w.group;
  b.base = b.act < b.group ? b.act : b.group;
  if (b.base == 0) return b;  // no k
  b.pieces = (b.base + LONGEST - 1) / LONGEST;
  b.length = ((b.base + b.pieces - 1) / b.pieces + UNIT - 1) / UNIT * UNIT;
  b.count = (b.k + b.base - 1) / b.base * b.pieces;
  return b;
}

// A block of k as the kernels visit it: units begin .. end - 1, the place of its scales.
struct Span {
  int32_t begin, end, scales;
};

FLCORE_INLINE void fill_spans(const Blocks& b, Span* spans) {
  for (int64_t i = 0; i < b.count; ++i) {
    const int64_t first = b.first(i), last = b.last(i);
    spans[i] = {int32_t(first / UNIT), int32_t(first < last ? (last + UNIT - 1) / UNIT : 0),
                int32_t(first < last ? first / b.group * 16 : 0)};
  }
}

// ---- codes as bytes -----------------------------------------------------------------------------

// Codes of k = 16 unit + 4 S .. + 3 of the rows of a block that its vector `part` holds.
template <int BITS, int S>
FLCORE_INLINE vi32 codes_at(const uint8_t* block, int64_t unit, int part) {
  const int at = part * VEC_BYTES;
  if constexpr (BITS == 8) {
    return load<vi32>(block + unit * 256 + S * 64 + at);
  } else if constexpr (BITS == 4) {
    const vu32 v = load<vu32>(block + unit * 128 + S / 2 * 64 + at);
    return (vi32)((S % 2 ? v >> 4 : v) & 0x0f0f0f0fu);
  } else if constexpr (BITS == 2) {
    return (vi32)((load<vu32>(block + unit * 64 + at) >> (2 * S)) & 0x03030303u);
  } else {
    const uint8_t* chunk = block + unit / 2 * 192;
    const vu32 low = load<vu32>(chunk + unit % 2 * 64 + at) >> (2 * S);
    const vu32 high = load<vu32>(chunk + 128 + at) >> int(4 * (unit % 2));
    const vu32 third = S < 2 ? high << (2 - S) : high >> (S - 2);
    return (vi32)((low & 0x03030303u) | (third & 0x04040404u));
  }
}

template <int BITS>
static void decode_units(const uint8_t* block, int64_t units, uint8_t* out) {
  for (int64_t u = 0; u < units; ++u)
    unroll<4>([&](auto s) FLCORE_LAMBDA {
      for (int part = 0; part < PARTS; ++part)
        store(out + u * 256 + s.value * 64 + part * VEC_BYTES,
              codes_at<BITS, s.value>(block, u, part));
    });
}

FLCORE_INLINE void decode_block(int bits, const uint8_t* block, int64_t units, uint8_t* out) {
  if (bits == 4)
    decode_units<4>(block, units, out);
  else if (bits == 3)
    decode_units<3>(block, units, out);
  else if (bits == 2)
    decode_units<2>(block, units, out);
  else
    decode_units<8>(block, units, out);
}

// ---- a tile -------------------------------------------------------------------------------------

struct Panel {
  const uint8_t* codes[PANEL_BLOCKS];  // the last one may repeat its neighbour
  const char* scales[PANEL_BLOCKS];
  const char* zeros[PANEL_BLOCKS];      // null: 2^(bits - 1)
  const int32_t* sums[PANEL_BLOCKS];    // [blocks of k][16] sums of codes, null: x is symmetric
  int scale_dtype, kind, bits;
  int64_t blocks;
  const Span* spans;  // [blocks]
};

// R rows of quantised x. start = -(sum of code - zero of x) of the block, times 2^(bits - 1) unless
// the weight has integer zeros.
struct Tile {
  const int32_t* words;  // [units][4][R] dwords of four codes
  const float* scale;    // [blocks][R]
  const int32_t* start;  // [blocks][R]
  const int32_t* minus;  // [blocks][R] -(zero of x), or null
};

// y[R][PANEL_ROWS] = sum over blocks of sx S float(acc), fused, in the order of the blocks.
template <int BITS, bool WIDE, int R>
static void tile(const Panel& p, const Tile& x, float* y) {
  const uint8_t* codes[PANEL_BLOCKS];
  for (int b = 0; b < PANEL_BLOCKS; ++b) codes[b] = p.codes[b];
  const bool by_row = p.kind == QW_INT && p.zeros[0];
  // dot products wait for the one before: few rows have several chains, which are joined at the end
  constexpr int CHAINS = !HAS_VNNI || R * PANEL_VECTORS >= 8 ? 1 : R * PANEL_VECTORS >= 4 ? 2 : 4;
  const float unscale = -1.0f / float(1 << (p.bits - 1));
  for (int i = 0; i < R * PANEL_ROWS; i += LANES) store(y + i, vf32{});
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t g16 = p.spans[b].scales, end = p.spans[b].end;
    const int32_t* start = x.start + b * R;
    vi32 acc[R][PANEL_VECTORS];
    unroll<PANEL_VECTORS>([&](auto v) FLCORE_LAMBDA {
      constexpr int BLOCK = v.value / PARTS, AT = v.value % PARTS * LANES;
      if (by_row) {
        const vi32 zero = load_u8(p.zeros[BLOCK] + g16 + AT);
        unroll<R>([&](auto r) FLCORE_LAMBDA { acc[r.value][v.value] = zero * start[r.value]; });
      } else {
        unroll<R>([&](auto r) FLCORE_LAMBDA { acc[r.value][v.value] = vi32{} + start[r.value]; });
      }
      if (x.minus) {  // what wraps here comes back with the products
        const vu32 sums = load<vu32>(p.sums[BLOCK] + b * 16 + AT);
        unroll<R>([&](auto r) FLCORE_LAMBDA {
          acc[r.value][v.value] =
              (vi32)((vu32)acc[r.value][v.value] + sums * uint32_t(x.minus[b * R + r.value]));
        });
      }
    });
    vi32 more[CHAINS][R][PANEL_VECTORS] = {};  // [0] is not used
    for (int64_t u = p.spans[b].begin; u < end; ++u) {
      const int32_t* words = x.words + u * 4 * R;
      if constexpr (BITS < 8 || R >= 4)
        for (int c = 0; c < PANEL_BLOCKS; ++c)
          for (int line = 0; line < 32 * BITS; line += 64)
            __builtin_prefetch(codes[c] + u * (32 * BITS) + line +
                                   (BITS < 8 ? AHEAD_PACKED : AHEAD_BYTES),
                               0, BITS < 8 ? 2 : 3);
      unroll<4>([&](auto s) FLCORE_LAMBDA {
        vi32 w[PANEL_VECTORS];
        unroll<PANEL_VECTORS>([&](auto v) FLCORE_LAMBDA {
          w[v.value] = codes_at<BITS, s.value>(codes[v.value / PARTS], u, v.value % PARTS);
        });
        unroll<R>([&](auto r) FLCORE_LAMBDA {
          const vi32 four = vi32{} + words[s.value * R + r.value];
          unroll<PANEL_VECTORS>([&](auto v) FLCORE_LAMBDA {
            constexpr int CHAIN = s.value % CHAINS;
            vi32& to = CHAIN ? more[CHAIN][r.value][v.value] : acc[r.value][v.value];
            to = dot4<WIDE>(to, w[v.value], four);
          });
        });
      });
    }
    unroll<CHAINS - 1, 1>([&](auto c) FLCORE_LAMBDA {
      unroll<R * PANEL_VECTORS>([&](auto i) FLCORE_LAMBDA {
        constexpr int r = i.value / PANEL_VECTORS, v = i.value % PANEL_VECTORS;
        acc[r][v] = wrapping(acc[r][v], more[c.value][r][v]);
      });
    });
    unroll<PANEL_VECTORS>([&](auto v) FLCORE_LAMBDA {
      constexpr int BLOCK = v.value / PARTS, AT = v.value % PARTS * LANES;
      const vf32 scale = load_f32(p.scale_dtype, p.scales[BLOCK], g16 + AT);
      unroll<R>([&](auto r) FLCORE_LAMBDA {
        float* at = y + r.value * PANEL_ROWS + v.value * LANES;
        store(at, vfma(scale * x.scale[b * R + r.value], to_float(acc[r.value][v.value]),
                       load<vf32>(at)));
      });
      if (p.kind == QW_FLOAT_ZERO) {
        const vf32 zero = load_f32(p.scale_dtype, p.zeros[BLOCK], g16 + AT);
        unroll<R>([&](auto r) FLCORE_LAMBDA {
          float* at = y + r.value * PANEL_ROWS + v.value * LANES;
          const float sum = float(start[r.value]) * unscale;
          store(at, vfma(zero * x.scale[b * R + r.value], vf32{} + sum, load<vf32>(at)));
        });
      }
    });
  }
}

typedef void (*TileFn)(const Panel&, const Tile&, float*);

// The kernel for `rows` rows, at most MOST.
template <int BITS, bool WIDE, int MOST = TILE_ROWS>
static TileFn tile_of(int64_t rows) {
#define FLCORE_TILE(R) &tile<BITS, WIDE, (R <= MOST ? R : 1)>
  static const TileFn all[12] = {FLCORE_TILE(1), FLCORE_TILE(2),  FLCORE_TILE(3),  FLCORE_TILE(4),
                                 FLCORE_TILE(5), FLCORE_TILE(6),  FLCORE_TILE(7),  FLCORE_TILE(8),
                                 FLCORE_TILE(9), FLCORE_TILE(10), FLCORE_TILE(11), FLCORE_TILE(12)};
#undef FLCORE_TILE
  return all[rows - 1];
}

}  // namespace FLCORE_ISA
}  // namespace flcore
