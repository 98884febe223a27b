// The gradient of a product with a packed weight, dX = dY W + low up, without W:
//   dX[m, k] = sum_n dY[m, n] w[n, k]      dY [m, n], W [n, k] in the layout tile16, dX [m, k]
//
// A panel of 128 rows n and up to 128 columns k is decoded into 64 KB of cache as float32, w
// rounded once, and multiplied with up to 256 rows of dY before the next one: codes are read once
// for 256 rows of dY, the decoded weight never leaves the cache. `up` is a further panel. Rows of
// dY of 16 bits take a faster way through integers where that is as good (qmatmul_dx_digits.h).
//
// Threads take slices of k, so that every sum belongs to one of them. Sums run over the 128 rows of
// a panel in the order of n and over the panels in theirs: the same bits for any number of threads
// and rows. (Between instruction sets they differ.) Error of an element:
// (128 + n / 128 + 2) 2^-24 sum_n |dY w|, then the rounding to the type of dX.
// (R5 of QLoRA's backward pass, Dettmers et al., arXiv 2305.14314, without their copy of W.)
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/fma.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_dx_decode.h"
#include "cpu/qmatmul_dx_digits.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t DEPTH = 128;      // rows n of a panel
constexpr int64_t WIDE = 4;         // chunks of 32 columns in a slice, where there are many
constexpr int64_t BATCH = 256;      // rows of dY that share a decoded panel
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12;       // 24 sums, 2 vectors of the panel, the rest is free
#else
constexpr int TILE_ROWS = 6;
#endif

// ---- dY: tiles of rows, their values of one n side by side --------------------------------------

struct Tiles {
  int64_t rows, count;  // tiles of like sizes
  FLCORE_MEMBER explicit Tiles(int64_t m) : rows(m), count((m + TILE_ROWS - 1) / TILE_ROWS) {}
  FLCORE_MEMBER int64_t first(int64_t t) const { return rows * t / count; }
};

// to[first(t) * depth + n * size(t) + i] = x[order[first(t) + i]][n], n < depth
template <int D>
static void pack_rows(const void* x, int64_t stride, const int32_t* order, int64_t depth,
                      const Tiles& tiles, float* to) {
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t first = tiles.first(t), size = tiles.first(t + 1) - first;
    float* at = to + first * depth;
    for (int64_t i = 0; i < size; ++i) {
      const char* row = static_cast<const char*>(x) + order[first + i] * stride * dtype_bytes(D);
      for (int64_t n = 0; n < depth; ++n) at[n * size + i] = load1<D>(row, n);
    }
  }
}

static void pack_rows(int dtype, const void* x, int64_t stride, const int32_t* order, int64_t depth,
                      const Tiles& tiles, float* to) {
  if (dtype == F32) return pack_rows<F32>(x, stride, order, depth, tiles, to);
  if (dtype == F16) return pack_rows<F16>(x, stride, order, depth, tiles, to);
  return pack_rows<BF16>(x, stride, order, depth, tiles, to);
}

// ---- a tile: ROWS rows of dY times 32 columns of a panel ----------------------------------------

template <int ROWS>
static void add_tile(const float* dy, const float* panel, int64_t depth, float* sums,
                     int64_t stride) {
  constexpr int VECTORS = 2;
  for (int column = 0; column < CHUNK_COLUMNS; column += VECTORS * LANES) {
    vf32 acc[ROWS][VECTORS];
    unroll<ROWS * VECTORS>([&](auto j) FLCORE_LAMBDA {
      acc[decltype(j)::value / VECTORS][decltype(j)::value % VECTORS] = vf32{};
    });
    for (int64_t n = 0; n < depth; ++n) {
      const float* w = panel + n * CHUNK_COLUMNS + column;
      const vf32 w0 = load<vf32>(w), w1 = load<vf32>(w + LANES);
      unroll<ROWS>([&](auto i) FLCORE_LAMBDA {
        constexpr int I = decltype(i)::value;
        const vf32 x = splat(dy[n * ROWS + I]);
        acc[I][0] = mac(x, w0, acc[I][0]);
        acc[I][1] = mac(x, w1, acc[I][1]);
      });
    }
    unroll<ROWS * VECTORS>([&](auto j) FLCORE_LAMBDA {
      constexpr int I = decltype(j)::value / VECTORS, V = decltype(j)::value % VECTORS;
      float* at = sums + I * stride + column + V * LANES;
      store(at, load<vf32>(at) + acc[I][V]);
    });
  }
}

typedef void AddTile(const float*, const float*, int64_t, float*, int64_t);
static AddTile* const ADD_TILE[] = {
    nullptr,      &add_tile<1>, &add_tile<2>,  &add_tile<3>,  &add_tile<4>,
    &add_tile<5>, &add_tile<6>,
#if defined(__AVX512F__)
    &add_tile<7>, &add_tile<8>, &add_tile<9>,  &add_tile<10>, &add_tile<11>, &add_tile<12>,
#endif
};

// ---- a slice of columns -------------------------------------------------------------------------

// How the scratch is divided: what all threads read, then what each has for itself.
struct Plan {
  int64_t batch, wide, slices;                // rows of dY, chunks of a slice, slices
  int64_t low, packed, values, heads, order;  // offsets
  int64_t own, panel, start, sums, bytes;     // own: of the first thread, the rest within it
  int64_t each;                               // bytes of a thread
  bool digits;
};

static Plan make_plan(const QMatmulArgs& a) {
  Plan p;
  p.digits = false;
#if defined(__AVX512VNNI__)
  p.digits = digits_apply(a);
#endif
  p.batch = a.m < BATCH ? a.m : BATCH;
  const int64_t chunks = chunk_count(a.w), pieces = (a.w.n + PIECE - 1) / PIECE;
  p.wide = chunks >= 8 * WIDE ? WIDE : 1;
  p.slices = (chunks + p.wide - 1) / p.wide;
  int64_t at = 0;
  const auto part = [&](int64_t bytes) {
    const int64_t from = at;
    at += whole_lines(bytes);
    return from;
  };
  p.low = part(p.batch * a.rank * 4);
  p.packed = part(p.batch * a.w.n * 4);
  p.values = part(p.digits ? p.batch * pieces * PIECE * 4 : 0);
  p.heads = part(p.digits ? p.batch * pieces * int64_t(sizeof(PieceRow)) : 0);
  p.order = part(p.batch * 8);
  p.own = at;
  p.panel = part(p.wide * DEPTH * CHUNK_COLUMNS * 4) - p.own;
  p.start = part(p.wide * CHUNK_COLUMNS * 4) - p.own;
  p.sums = part(p.batch * p.wide * CHUNK_COLUMNS * 4) - p.own;
  p.each = at - p.own;
  p.bytes = p.own + a.threads * p.each;
  return p;
}

// One batch: rows m0 .. m0 + rows - 1 of dY, in an order that has those in digits first.
struct Batch {
  int64_t m0, rows, in_digits;
  char* memory;
};

static void add_panel(const float* dy, const Tiles& tiles, const float* panel, int64_t depth,
                      int64_t chunks, float* sums, int64_t stride) {
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t first = tiles.first(t);
      ADD_TILE[tiles.first(t + 1) - first](dy + first * depth,
                                           panel + c * (DEPTH * CHUNK_COLUMNS), depth,
                                           sums + first * stride + c * CHUNK_COLUMNS, stride);
    }
}

template <int D>
static void store_row(void* y, int64_t at, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_lanes<D>(y, at + i, load<vf32>(from + i));
  for (; i < count; ++i) store1<D>(y, at + i, from[i]);
}

// Columns of slice s of dX for a batch
static void slice(const QMatmulArgs& a, const Plan& p, const Batch& batch, int64_t s, char* own) {
  const QWeight& w = a.w;
  const int64_t first = s * p.wide, left = chunk_count(w) - first;
  const int64_t chunks = left < p.wide ? left : p.wide, stride = p.wide * CHUNK_COLUMNS;
  const int64_t column = first * CHUNK_COLUMNS, rest = w.k - column;
  const int64_t columns = rest < chunks * CHUNK_COLUMNS ? rest : chunks * CHUNK_COLUMNS;
  float* panel = reinterpret_cast<float*>(own + p.panel);
  float* sums = reinterpret_cast<float*>(own + p.sums);
  __builtin_memset(sums, 0, size_t(batch.rows * stride * 4));
#if defined(__AVX512VNNI__)
  const Levels levels = w.kind == QW_TABLE ? whole_levels(w.table) : Levels{};
  for (int64_t n = 0; batch.in_digits && n < w.n; n += PIECE)
    add_piece(w, levels, reinterpret_cast<float*>(batch.memory + p.values) + n * batch.in_digits,
              reinterpret_cast<PieceRow*>(batch.memory + p.heads) + n / PIECE * batch.in_digits,
              batch.in_digits, n / BLOCK_ROWS, first, chunks, reinterpret_cast<uint8_t*>(panel),
              reinterpret_cast<int32_t*>(own + p.start), sums, stride);
#endif
  const Tiles tiles(batch.rows - batch.in_digits);
  const float* packed = reinterpret_cast<float*>(batch.memory + p.packed);
  ChunkScales scales;
  scales.block = -1;
  for (int64_t n = 0; tiles.rows && n < w.n; n += DEPTH) {
    const int64_t depth = w.n - n < DEPTH ? w.n - n : DEPTH;
    for (int64_t r = 0; r < depth; r += BLOCK_ROWS)
      for (int64_t c = 0; c < chunks; ++c)
        decode_chunk(w, (n + r) / BLOCK_ROWS, first + c, scales,
                     panel + (c * DEPTH + r) * CHUNK_COLUMNS);
    add_panel(packed + n * tiles.rows, tiles, panel, depth, chunks,
              sums + batch.in_digits * stride, stride);
  }
  const Tiles all(batch.rows);
  const float* low = reinterpret_cast<float*>(batch.memory + p.low);
  for (int64_t n = 0; n < a.rank; n += DEPTH) {
    const int64_t depth = a.rank - n < DEPTH ? a.rank - n : DEPTH;
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t r = 0; r < depth; ++r) {
        float* row = panel + (c * DEPTH + r) * CHUNK_COLUMNS;
        const int64_t at = c * CHUNK_COLUMNS;
        for (int64_t j = 0; j < CHUNK_COLUMNS; ++j)
          row[j] = at + j < columns ? a.up[(n + r) * w.k + column + at + j] : 0.0f;
      }
    add_panel(low + n * all.rows, all, panel, depth, chunks, sums, stride);
  }
  const int32_t* order = reinterpret_cast<int32_t*>(batch.memory + p.order);
  for (int64_t i = 0; i < batch.rows; ++i) {
    const int64_t at = (batch.m0 + order[i]) * a.y_stride + column;
    const float* from = sums + i * stride;
    if (a.y_dtype == F32)
      store_row<F32>(a.y, at, from, columns);
    else if (a.y_dtype == F16)
      store_row<F16>(a.y, at, from, columns);
    else
      store_row<BF16>(a.y, at, from, columns);
  }
}

// ---- the call -----------------------------------------------------------------------------------

// order [rows]: the rows that can be computed in digits, then the others; returns how many can.
static int64_t sort_rows(const QMatmulArgs& a, const Plan& p, const char* x, int64_t rows,
                         int32_t* order) {
  int64_t in_digits = 0;
#if defined(__AVX512VNNI__)
  int32_t* fits = order + p.batch;
  if (p.digits)
    for_chunks(rows, a.threads, [&](int64_t i) {
      const char* row = x + i * a.x_stride * 2;
      fits[i] = a.x_dtype == BF16 ? fits_digits<BF16>(row, a.w.n) : fits_digits<F16>(row, a.w.n);
    });
  for (int64_t i = 0; i < rows; ++i)
    if (p.digits && fits[i]) order[in_digits++] = int32_t(i);
  int64_t at = in_digits;
  for (int64_t i = 0; i < rows; ++i)
    if (!p.digits || !fits[i]) order[at++] = int32_t(i);
#else
  (void)a;
  (void)p;
  (void)x;
  for (int64_t i = 0; i < rows; ++i) order[i] = int32_t(i);
#endif
  return in_digits;
}

static int64_t scratch_bytes(const QMatmulArgs& a) { return make_plan(a).bytes; }

static void run(const QMatmulArgs& a) {
  if (!a.m || !a.w.k) return;
  const Plan p = make_plan(a);
  char* memory = static_cast<char*>(a.scratch);
  int32_t* order = reinterpret_cast<int32_t*>(memory + p.order);
  for (int64_t m0 = 0; m0 < a.m; m0 += BATCH) {
    Batch batch = {m0, a.m - m0 < BATCH ? a.m - m0 : BATCH, 0, memory};
    const int64_t bytes = dtype_bytes(a.x_dtype);
    const char* x = static_cast<const char*>(a.x) + m0 * a.x_stride * bytes;
    batch.in_digits = sort_rows(a, p, x, batch.rows, order);
    const Tiles tiles(batch.rows - batch.in_digits), all(batch.rows);
    for_chunks((a.w.n + PIECE - 1) / PIECE, a.threads, [&](int64_t piece) {
      const int64_t from = piece * PIECE, end = from + PIECE < a.w.n ? from + PIECE : a.w.n;
#if defined(__AVX512VNNI__)
      const int64_t count = batch.in_digits;
      float* values = reinterpret_cast<float*>(memory + p.values) + from * count;
      PieceRow* heads = reinterpret_cast<PieceRow*>(memory + p.heads) + piece * count;
      for (int64_t i = 0; i < count; ++i) {
        const char* row = x + (order[i] * a.x_stride + from) * 2;
        heads[i] = a.x_dtype == BF16 ? scale_piece<BF16>(row, end - from, values + i * PIECE)
                                     : scale_piece<F16>(row, end - from, values + i * PIECE);
      }
#endif
      for (int64_t n = from; tiles.rows && n < end; n += DEPTH)
        pack_rows(a.x_dtype, x + n * bytes, a.x_stride, order + batch.in_digits,
                  end - n < DEPTH ? end - n : DEPTH, tiles,
                  reinterpret_cast<float*>(memory + p.packed) + n * tiles.rows);
    });
    for (int64_t n = 0; n < a.rank; n += DEPTH)
      pack_rows(F32, a.low + m0 * a.rank + n, a.rank, order,
                a.rank - n < DEPTH ? a.rank - n : DEPTH, all,
                reinterpret_cast<float*>(memory + p.low) + n * all.rows);
    for_ranges(p.slices, a.threads, [&](int64_t t, int64_t first, int64_t end) {
      for (int64_t s = first; s < end; ++s) slice(a, p, batch, s, memory + p.own + t * p.each);
    });
  }
}

}  // namespace FLCORE_ISA

extern const QMatmulFns FLCORE_TABLE(qmatmul_dx);
const QMatmulFns FLCORE_TABLE(qmatmul_dx) = {&FLCORE_ISA::run, &FLCORE_ISA::scratch_bytes};

}  // namespace flcore
