// y = x W^T + bias + low up^T with W in codes of 2, 3, 4 or 8 bits and x quantised to 8 bits on the
// way, one scale for `act_block` values of a row (the formulas are in act_quant.h):
//   y[m, n] = sum over blocks b of sx[m, b] S[n, b] (sum qx q - Z sum qx)         int32 sums
// (quantized matmul, R3; asymmetric x: (qx - zx) in the place of qx, where zx sum q takes the sums
// of codes of every row of W, R4). Terms are added in the order of the blocks, each by one fused
// multiply-add in float32; integer sums are exact. So neither the level nor the threads nor the
// tiles of rows change a bit.
//
// Bytes: the codes of W once for up to CHUNK_ROWS rows of x. Work: x is quantised into scratch, in
// tiles of up to TILE_ROWS rows whose dwords of four k lie side by side; panels of 16 or 32 rows of
// W go to the threads and meet all tiles in second-level cache. Codes are taken apart in registers,
// once a tile, on units that dot products leave idle: at 256 rows of x and 4 bits 7 % faster than a
// panel that is decoded to bytes first. Only 3 bits and more than a few rows take that way.
#include "api.h"
#include "cpu/act_quant.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_int8_tile.h"
#include "cpu/qweight.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t CHUNK_ROWS = 1020;  // rows of x quantised at once
constexpr int64_t BUFFER = 1024;      // codes of a row on their way into a tile
constexpr int INLINE_3 = TILE_ROWS < 4 ? TILE_ROWS : 4;  // rows at most where codes have 3 bits
constexpr int64_t SHARED_QUANT = 1 << 16;  // values of x that more than one thread quantises

// Where x lies once it is quantised, behind the spans of k: tile t holds rows first(t) to
// first(t + 1) - 1.
struct Rows {
  int64_t rows, tiles, units, blocks;
  int32_t* words;
  float* scale;
  int32_t *start, *minus;

  FLCORE_MEMBER int64_t first(int64_t t) const { return t * rows / tiles; }
  FLCORE_MEMBER int64_t tile_with(int64_t row) const {
    int64_t t = row * tiles / rows;
    while (first(t) > row) --t;
    while (first(t + 1) <= row) ++t;
    return t;
  }
  FLCORE_MEMBER Tile at(int64_t t) const {
    const int64_t f = first(t);
    return {words + f * units * 4, scale + f * blocks, start + f * blocks,
            minus ? minus + f * blocks : nullptr};
  }
};

static int64_t tiles_of(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
static int64_t units_of(const QMatmulArgs& a) { return (a.w.k + UNIT - 1) / UNIT; }

static Rows rows_of(const QMatmulArgs& a, int64_t rows, const Blocks& blocks) {
  const int64_t units = units_of(a);
  char* p = static_cast<char*>(a.scratch) + whole_lines(blocks.count * int64_t(sizeof(Span)));
  Rows r = {rows, tiles_of(rows), units, blocks.count, nullptr, nullptr,
            nullptr, nullptr};
  r.words = reinterpret_cast<int32_t*>(p);
  p += whole_lines(rows * units * UNIT);
  r.scale = reinterpret_cast<float*>(p);
  p += whole_lines(rows * blocks.count * 4);
  r.start = reinterpret_cast<int32_t*>(p);
  p += whole_lines(rows * blocks.count * 4);
  if (a.asymmetric) r.minus = reinterpret_cast<int32_t*>(p);
  return r;
}

static int64_t most_rows(const QMatmulArgs& a) { return a.m < CHUNK_ROWS ? a.m : CHUNK_ROWS; }

static bool decodes(const QMatmulArgs& a, int64_t rows) {
  return a.w.bits == 3 && rows > INLINE_3;
}

static int64_t quantised_bytes(const QMatmulArgs& a, const Blocks& blocks) {
  const int64_t rows = most_rows(a);
  return whole_lines(rows * units_of(a) * UNIT) + 3 * whole_lines(rows * blocks.count * 4) +
         whole_lines(blocks.count * int64_t(sizeof(Span)));
}

static int64_t thread_bytes(const QMatmulArgs& a) {
  const int64_t panel = decodes(a, most_rows(a)) ? PANEL_BLOCKS * units_of(a) * 256 : 0;
  return whole_lines(panel) + whole_lines(a.rank * PANEL_ROWS * 4);
}

static int64_t scratch_bytes(const QMatmulArgs& a) {
  return quantised_bytes(a, blocks_of(a.w, a.act_block)) + a.threads * thread_bytes(a) + 64;
}

// ---- x to codes ---------------------------------------------------------------------------------

template <int D>
static void quantise_row(const QMatmulArgs& a, int64_t first_row, const Rows& to, int64_t row,
                         const Blocks& blocks) {
  const int64_t t = to.tile_with(row), lane = row - to.first(t);
  const int64_t width = to.first(t + 1) - to.first(t);
  const Tile tile = to.at(t);
  int32_t* words = const_cast<int32_t*>(tile.words) + lane;
  const int64_t at = lane + to.first(t) * blocks.count;  // of block 0
  const bool by_row = a.w.kind == QW_INT && a.w.zeros;
  const int32_t factor = by_row ? -1 : -(1 << (a.w.bits - 1));
  const char* x =
      static_cast<const char*>(a.x) + dtype_bytes(D) * (first_row + row) * a.x_stride;
  int8_t buffer[BUFFER];
  ActScale s = {};
  int64_t measured = 0;  // end of the values that s was measured for
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t begin = blocks.first(b), stop = blocks.last(b);
    if (begin >= measured && begin < stop) {
      measured = (begin / blocks.act + 1) * blocks.act;
      if (measured > blocks.k) measured = blocks.k;
      s = measure_block<D>(x, begin, measured - begin, a.asymmetric);
    }
    int32_t sum = 0;
    for (int64_t i = begin; i < stop; i += BUFFER) {
      const int64_t n = stop - i < BUFFER ? stop - i : BUFFER, whole = (n + UNIT - 1) / UNIT * UNIT;
      sum += code_block<D>(x, i, n, s, buffer);
      for (int64_t j = n; j < whole; ++j) buffer[j] = 0;
      int32_t* out = words + i / 4 * width;
      for (int64_t j = 0; j < whole; j += 4) out[j / 4 * width] = load<int32_t>(buffer + j);
    }
    to.scale[at + b * width] = s.scale;
    to.start[at + b * width] = factor * sum;
    if (to.minus) to.minus[at + b * width] = -s.zero;
  }
}

static void quantise(const QMatmulArgs& a, int64_t first_row, const Rows& to,
                     const Blocks& blocks) {
  const int threads = to.rows * a.w.k < SHARED_QUANT ? 1 : a.threads;
  for_chunks(to.rows, threads, [&](int64_t row) {
    if (a.x_dtype == F32)
      quantise_row<F32>(a, first_row, to, row, blocks);
    else if (a.x_dtype == F16)
      quantise_row<F16>(a, first_row, to, row, blocks);
    else
      quantise_row<BF16>(a, first_row, to, row, blocks);
  });
}

// ---- results ------------------------------------------------------------------------------------

template <int D>
static void deliver(const QMatmulArgs& a, int64_t row, int64_t n0, int64_t count, const float* up,
                    float* y) {
  if (a.bias)
    for (int64_t c = 0; c < count; ++c) y[c] += a.bias[n0 + c];
  const float* low = a.low + row * a.rank;
  for (int64_t q = 0; q < a.rank; ++q)
    for (int64_t c = 0; c < PANEL_ROWS; c += LANES)
      store(y + c, vfma(vf32{} + low[q], load<vf32>(up + q * PANEL_ROWS + c), load<vf32>(y + c)));
  char* out = static_cast<char*>(a.y) + dtype_bytes(D) * (row * a.y_stride + n0);
  int64_t c = 0;
  for (; c + LANES <= count; c += LANES) store_lanes<D>(out, c, load<vf32>(y + c));
  for (; c < count; ++c) store1<D>(out, c, y[c]);
}

static TileFn choose(int bits, bool decoded, int64_t rows) {
  if (bits == 8) return tile_of<8, true>(rows);
  if (decoded) return tile_of<8, HAS_VNNI>(rows);  // with VNNI the width makes no difference
  if (bits == 4) return tile_of<4, false>(rows);
  return bits == 3 ? tile_of<3, false, INLINE_3>(rows) : tile_of<2, false>(rows);
}

// Panels first .. last - 1 of W against all tiles.
static void panels(const QMatmulArgs& a, int64_t first_row, const Rows& x, const Blocks& blocks,
                   int64_t first, int64_t last, char* scratch) {
  const int64_t units = x.units, count = block_count(a.w), groups = group_count(a.w);
  const int64_t scale_bytes = groups * 16 * dtype_bytes(a.w.scale_dtype);
  const int64_t zero_bytes = a.w.kind == QW_INT ? groups * 16 : scale_bytes;
  const bool decoded = decodes(a, x.rows);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);
  float* up = reinterpret_cast<float*>(
      scratch + (decoded ? whole_lines(PANEL_BLOCKS * units * 256) : 0));
  float y[TILE_ROWS * PANEL_ROWS];
  for (int64_t p = first; p < last; ++p) {
    Panel panel = {};
    panel.scale_dtype = a.w.scale_dtype;
    panel.kind = a.w.kind;
    panel.bits = a.w.bits;
    panel.blocks = blocks.count;
    panel.spans = static_cast<const Span*>(a.scratch);
    for (int b = 0; b < PANEL_BLOCKS; ++b) {
      const int64_t at = p * PANEL_BLOCKS + b < count ? p * PANEL_BLOCKS + b : count - 1;
      panel.codes[b] = block_codes(a.w, at);
      panel.scales[b] = static_cast<const char*>(a.w.scales) + at * scale_bytes;
      panel.zeros[b] = a.w.zeros ? static_cast<const char*>(a.w.zeros) + at * zero_bytes : nullptr;
      panel.sums[b] = a.asymmetric ? a.code_sums + at * blocks.count * 16 : nullptr;
      if (decoded) {
        decode_block(a.w.bits, panel.codes[b], units, bytes + b * units * 256);
        panel.codes[b] = bytes + b * units * 256;
      }
    }
    const int64_t n0 = p * PANEL_ROWS;
    const int64_t wide = a.w.n - n0 < PANEL_ROWS ? a.w.n - n0 : PANEL_ROWS;
    if (a.rank) turn_up(a, n0, PANEL_ROWS, up);
    for (int64_t t = 0; t < x.tiles; ++t) {
      const int64_t row = x.first(t), rows = x.first(t + 1) - row;
      choose(a.w.bits, decoded, rows)(panel, x.at(t), y);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t to = first_row + row + r;
        if (a.y_dtype == F32)
          deliver<F32>(a, to, n0, wide, up, y + r * PANEL_ROWS);
        else if (a.y_dtype == F16)
          deliver<F16>(a, to, n0, wide, up, y + r * PANEL_ROWS);
        else
          deliver<BF16>(a, to, n0, wide, up, y + r * PANEL_ROWS);
      }
    }
  }
}

static void run(const QMatmulArgs& a) {
  const Blocks blocks = blocks_of(a.w, a.act_block);
  const int64_t count = (a.w.n + PANEL_ROWS - 1) / PANEL_ROWS;
  fill_spans(blocks, static_cast<Span*>(a.scratch));
  char* scratch = static_cast<char*>(a.scratch) + quantised_bytes(a, blocks);
  const int64_t each = thread_bytes(a);
  for (int64_t first = 0; first < a.m; first += CHUNK_ROWS) {
    const Rows x = rows_of(a, a.m - first < CHUNK_ROWS ? a.m - first : CHUNK_ROWS, blocks);
    quantise(a, first, x, blocks);
    for_ranges(count, a.threads, [&](int64_t t, int64_t begin, int64_t end) {
      panels(a, first, x, blocks, begin, end, scratch + t * each);
    });
  }
}

// ---- sums of codes, for asymmetric x ------------------------------------------------------------

static int64_t sum_blocks(const QWeight& w, int64_t act_block) {
  return blocks_of(w, act_block).count;
}

template <int BITS>
static void sum_codes(const QWeight& w, const Blocks& blocks, int64_t at, int32_t* out) {
  const uint8_t* codes = block_codes(w, at);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t stop = blocks.last(b);
    vi32 acc[PARTS] = {};
    for (int64_t u = blocks.first(b) / UNIT; u * UNIT < stop; ++u)
      unroll<4>([&](auto s) FLCORE_LAMBDA {
        const int64_t left = stop - u * UNIT - s.value * 4;  // what follows k does not count
        const int32_t ones = left >= 4 ? 0x01010101 : left > 0 ? 0x010101 >> (8 * (3 - left)) : 0;
        for (int part = 0; part < PARTS; ++part)
          acc[part] =
              dot4<true>(acc[part], codes_at<BITS, s.value>(codes, u, part), vi32{} + ones);
      });
    for (int part = 0; part < PARTS; ++part) store(out + b * 16 + part * LANES, acc[part]);
  }
}

// out [blocks of 16 rows][blocks of k][16]
static void code_sums(const QWeight& w, int64_t act_block, int32_t* out, int threads) {
  const Blocks blocks = blocks_of(w, act_block);
  for_chunks(block_count(w), threads, [&](int64_t at) {
    int32_t* to = out + at * blocks.count * 16;
    if (w.bits == 8)
      sum_codes<8>(w, blocks, at, to);
    else if (w.bits == 4)
      sum_codes<4>(w, blocks, at, to);
    else if (w.bits == 3)
      sum_codes<3>(w, blocks, at, to);
    else
      sum_codes<2>(w, blocks, at, to);
  });
}

}  // namespace FLCORE_ISA

extern const QMatmulInt8Fns FLCORE_TABLE(qmatmul_int8);
const QMatmulInt8Fns FLCORE_TABLE(qmatmul_int8) = {&FLCORE_ISA::run, &FLCORE_ISA::scratch_bytes,
                                                    &FLCORE_ISA::sum_blocks,
                                                    &FLCORE_ISA::code_sums};

}  // namespace flcore
