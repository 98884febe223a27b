// Power iteration on every matrix of an update, fused with the feedback form (csrc/low_rank.cpp puts
// the passes together). U is what feedback_load gives for a layer seen as n rows of m columns.
//   project  P = U Q          reads g and the states
//   back     Q = U^T P        reads them again
//   apply    D = P Q^T; e <- t - D, h <- h + D, v <- s    reads them a third time, writes the states
// so 28 bytes a coordinate for EF14 and 12 without state; U is never stored. `keep` stores it in e on
// the way instead, for clients that send one factor and learn D later (12 bytes, 4 of them written).
//
// Sums are float32 within a tile of 64 rows and 1024 columns, float64 above it, in the order of the
// tiles: over columns 16 lanes (lane c % 16 takes column c) and a tree, over rows one after the other.
// No fma; the same bits for any number of threads, level, and way of holding the layers.
// Gram-Schmidt is float64 with 16 lanes, each vector made orthogonal to those before it twice.
// Source: Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, arXiv 1905.13727.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/feedback.h"
#include "cpu/layers.h"
#include "cpu/low_rank_rows.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t BLOCK = 2048;  // coordinates of a feedback block: its parts stay in L1
constexpr int SUM_LANES = 16;
constexpr double DEPENDENT = 1e-12;  // of a vector's norm: what is left of it is rounding

constexpr float INFINITE = __builtin_inff();

// ---- tiles -------------------------------------------------------------------------------------

struct Tile {
  const LowRankLayer* layer;
  int64_t row, column;          // of tiles
  int64_t begin, end;           // rows
  int64_t first, width;         // columns
};

int64_t tile_columns(const LowRankLayer& l) {
  return (l.m + LOW_RANK_COLUMNS - 1) / LOW_RANK_COLUMNS;
}

Tile tile_at(const LowRankArgs& x, int64_t index) {
  const int64_t at = find_layer(x.first_tile, x.layers, index);
  const LowRankLayer& l = x.layer[at];
  const int64_t columns = tile_columns(l), local = index - x.first_tile[at];
  Tile t;
  t.layer = &l;
  t.row = local / columns;
  t.column = local % columns;
  t.begin = t.row * LOW_RANK_ROWS;
  t.end = t.begin + LOW_RANK_ROWS < l.n ? t.begin + LOW_RANK_ROWS : l.n;
  t.first = t.column * LOW_RANK_COLUMNS;
  t.width = t.first + LOW_RANK_COLUMNS < l.m ? LOW_RANK_COLUMNS : l.m - t.first;
  return t;
}

// visit(first row, rows, first coordinate, block, buffers): the tile's rows as feedback blocks, whole
// rows together where they follow one another in memory.
template <class Visit>
FLCORE_INLINE void for_blocks(const LowRankArgs& x, const Tile& t, const Visit& visit) {
  float memory[FEEDBACK_PARTS * BLOCK];
  const FeedbackBuffers buffers = feedback_buffers(memory, BLOCK);
  const FeedbackArgs& f = *x.feedback;
  const LowRankLayer& l = *t.layer;
  const int64_t step = t.width == l.m ? BLOCK / l.m : 1;
  int64_t layer = find_layer(f.starts, f.layers, l.start + t.begin * l.m + t.first);
  for (int64_t i = t.begin; i < t.end; i += step) {
    const int64_t rows = i + step < t.end ? step : t.end - i;
    const int64_t at = l.start + i * l.m + t.first;
    visit(i, rows, at, feedback_load(f, at, rows * t.width, layer, buffers), buffers);
  }
}

// The largest |t| and |h| of a block, infinite when a value is not finite.
float largest(const FeedbackArgs& f, int64_t at, int64_t count, const FeedbackBlock& block) {
  if (!block.finite) return INFINITE;
  vi32 tops = {};
  int32_t top = 0;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    tops = feedback_larger(tops, feedback_key(load<vf32>(block.t + i)));
    if (f.h) tops = feedback_larger(tops, feedback_key(load<vf32>(f.h + at + i)));
  }
  for (; i < count; ++i) {
    top = feedback_larger(top, feedback_key(load<float>(block.t + i)));
    if (f.h) top = feedback_larger(top, feedback_key(f.h[at + i]));
  }
  for (int k = 0; k < LANES; ++k) top = feedback_larger(top, tops[k]);
  return float_of(uint32_t(top));
}

// ---- values of layers that are not compressed ---------------------------------------------------

// Writes u as values and returns what a receiver reads, in `sent`. A finite value beyond bfloat16
// becomes its largest number.
void put_values(const LowRankArgs& x, int64_t at, const float* u, int64_t count, float* sent) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = load<float>(u + i);
    if (x.value_dtype == F32) {
      store(x.values + 4 * (at + i), value);
      sent[i] = value;
      continue;
    }
    uint16_t raw = f32_to_bf16(value);
    if ((raw & 0x7fffu) == 0x7f80u) --raw;
    store(x.values + 2 * (at + i), raw);
    sent[i] = bf16_to_f32(raw);
  }
}

// e <- t for a matrix, whose D is not known yet; 0 where u itself is sent
void keep_block(const LowRankArgs& x, const Tile& t, int64_t row, int64_t at, int64_t count,
                const FeedbackBlock& block, const FeedbackBuffers& buffers) {
  const LowRankLayer& l = *t.layer;
  if (l.rank > 0) {
    feedback_store(*x.feedback, at, count, block, nullptr, buffers.t);
    return;
  }
  float sent[BLOCK];
  put_values(x, l.values + row * l.m + t.first, block.u, count, sent);
  feedback_store(*x.feedback, at, count, block, sent, buffers.t);
}

// ---- P = U Q -------------------------------------------------------------------------------------

// out[k] = sum_j u[j] q[k m + j] for K rows of Q^T, 16 lanes and a tree
template <int K>
void dots(const float* u, const float* q, int64_t m, int64_t width, float* out) {
  constexpr int PARTS = SUM_LANES / LANES;
  vf32 sums[K][PARTS] = {};
  int64_t j = 0;
  for (; j + SUM_LANES <= width; j += SUM_LANES) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) {
      const vf32 value = load<vf32>(u + j + part * LANES);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
        sums[k][part] = sums[k][part] + value * load<vf32>(q + k * m + j + part * LANES);
    }
  }
  for (int k = 0; k < K; ++k) {
    float lanes[SUM_LANES];
    for (int part = 0; part < PARTS; ++part) store(lanes + part * LANES, sums[k][part]);
    for (int64_t i = j; i < width; ++i)
      lanes[i - j] = lanes[i - j] + load<float>(u + i) * load<float>(q + k * m + i);
    for (int half = SUM_LANES / 2; half; half /= 2)
      for (int c = 0; c < half; ++c) lanes[c] = lanes[c] + lanes[c + half];
    out[k] = lanes[0];
  }
}

void row_dots(const float* u, const float* q, int64_t m, int64_t width, int64_t rank, double* out) {
  float sums[LOW_RANK_MAX];
  int64_t k = 0;
  for (; k + 4 <= rank; k += 4) dots<4>(u, q + k * m, m, width, sums + k);
  if (k + 2 <= rank) {
    dots<2>(u, q + k * m, m, width, sums + k);
    k += 2;
  }
  if (k < rank) dots<1>(u, q + k * m, m, width, sums + k);
  for (k = 0; k < rank; ++k) out[k] = double(sums[k]);
}

// Elements of `partial` before a layer: one double a column of tiles and element of P.
int64_t partial_start(const LowRankArgs& x, int64_t layer) {
  int64_t at = 0;
  for (int64_t l = 0; l < layer; ++l)
    at += tile_columns(x.layer[l]) * x.layer[l].n * x.layer[l].rank;
  return at;
}

void project(const LowRankArgs& x, const float* q, double* partial, float* top) {
  for_chunks(x.first_tile[x.layers], x.feedback->threads, [&](int64_t index) {
    const Tile t = tile_at(x, index);
    const LowRankLayer& l = *t.layer;
    double* out = partial + partial_start(x, t.layer - x.layer) + t.column * l.n * l.rank;
    float most = 0;
    for_blocks(x, t, [&](int64_t i, int64_t rows, int64_t at, const FeedbackBlock& block,
                         const FeedbackBuffers& buffers) FLCORE_LAMBDA {
      const float here = largest(*x.feedback, at, rows * t.width, block);
      most = here > most ? here : most;
      for (int64_t r = 0; l.rank && r < rows; ++r)
        row_dots(block.u + r * t.width, q + l.q + t.first, l.m, t.width, l.rank,
                 out + (i + r) * l.rank);
      if (x.keep) keep_block(x, t, i, at, rows * t.width, block, buffers);
    });
    top[index] = most;
  });
}

void sum_columns(const LowRankArgs& x, const double* partial, double* p) {
  for_chunks(x.layers, x.feedback->threads, [&](int64_t layer) {
    const LowRankLayer& l = x.layer[layer];
    const double* from = partial + partial_start(x, layer);
    const int64_t columns = tile_columns(l), elements = l.n * l.rank;
    for (int64_t i = 0; i < l.n; ++i)
      for (int64_t k = 0; k < l.rank; ++k) {
        double sum = from[i * l.rank + k];
        for (int64_t c = 1; c < columns; ++c) sum = sum + from[c * elements + i * l.rank + k];
        p[l.p + k * l.n + i] = sum;
      }
  });
}

// ---- Q = U^T P -----------------------------------------------------------------------------------

// sums[k width + j] += u_r[j] p_r[k] for R rows, one after the other
template <int R>
void add_rows(const float* u, int64_t stride, const float* p, int64_t rank, int64_t width,
              float* sums) {
  for (int64_t k = 0; k < rank; ++k) {
    float* to = sums + k * width;
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
      vf32 sum = load<vf32>(to + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum = sum + p[r * rank + k] * load<vf32>(u + r * stride + j);
      store(to + j, sum);
    }
    for (; j < width; ++j) {
      float sum = to[j];
      for (int r = 0; r < R; ++r) sum = sum + p[r * rank + k] * load<float>(u + r * stride + j);
      to[j] = sum;
    }
  }
}

void back(const LowRankArgs& x, const float* p, const int64_t* first, float* partial, float* top) {
  for_chunks(x.first_tile[x.layers], x.feedback->threads, [&](int64_t index) {
    const Tile t = tile_at(x, index);
    const LowRankLayer& l = *t.layer;
    if (top) top[index] = 0;
    if (l.rank == 0 && !x.keep && !top) return;
    float sums[LOW_RANK_MAX * LOW_RANK_COLUMNS];
    __builtin_memset(sums, 0, size_t(l.rank * t.width) * sizeof(float));
    for_blocks(x, t, [&](int64_t i, int64_t rows, int64_t at, const FeedbackBlock& block,
                         const FeedbackBuffers& buffers) FLCORE_LAMBDA {
      if (top) {
        const float here = largest(*x.feedback, at, rows * t.width, block);
        top[index] = here > top[index] ? here : top[index];
      }
      const float* factors = p + l.p + i * l.rank;
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4)
        add_rows<4>(block.u + r * t.width, t.width, factors + r * l.rank, l.rank, t.width, sums);
      for (; r < rows; ++r)
        add_rows<1>(block.u + r * t.width, t.width, factors + r * l.rank, l.rank, t.width, sums);
      if (x.keep) keep_block(x, t, i, at, rows * t.width, block, buffers);
    });
    float* out = partial + first[t.layer - x.layer] + t.row * l.rank * l.m + t.first;
    for (int64_t k = 0; k < l.rank; ++k)
      __builtin_memcpy(out + k * l.m, sums + k * t.width, size_t(t.width) * sizeof(float));
  });
}

void sum_rows(const LowRankArgs& x, const float* partial, const int64_t* first, double* q) {
  for_chunks(x.first_column[x.layers], x.feedback->threads, [&](int64_t index) {
    const int64_t layer = find_layer(x.first_column, x.layers, index);
    const LowRankLayer& l = x.layer[layer];
    const int64_t from = (index - x.first_column[layer]) * LOW_RANK_COLUMNS;
    const int64_t end = from + LOW_RANK_COLUMNS < l.m ? from + LOW_RANK_COLUMNS : l.m;
    const int64_t rows = (l.n + LOW_RANK_ROWS - 1) / LOW_RANK_ROWS;
    const float* sums = partial + first[layer];
    for (int64_t k = 0; k < l.rank; ++k)
      for (int64_t j = from; j < end; ++j) {
        double sum = double(sums[k * l.m + j]);
        for (int64_t row = 1; row < rows; ++row)
          sum = sum + double(sums[(row * l.rank + k) * l.m + j]);
        q[l.q + k * l.m + j] = sum;
      }
  });
}

// ---- Gram-Schmidt --------------------------------------------------------------------------------

double dot(const double* a, const double* b, int64_t n) {
  constexpr int PARTS = SUM_LANES / LANES64;
  vf64 sums[PARTS] = {};
  int64_t i = 0;
  for (; i + SUM_LANES <= n; i += SUM_LANES)
#pragma GCC unroll 8
    for (int part = 0; part < PARTS; ++part)
      sums[part] =
          sums[part] + load<vf64>(a + i + part * LANES64) * load<vf64>(b + i + part * LANES64);
  double lanes[SUM_LANES];
  for (int part = 0; part < PARTS; ++part) store(lanes + part * LANES64, sums[part]);
  for (int64_t j = i; j < n; ++j) lanes[j - i] = lanes[j - i] + a[j] * b[j];
  for (int half = SUM_LANES / 2; half; half /= 2)
    for (int c = 0; c < half; ++c) lanes[c] = lanes[c] + lanes[c + half];
  return lanes[0];
}

void gram_schmidt(double* x, int64_t rank, int64_t n) {
  for (int64_t k = 0; k < rank; ++k) {
    double* v = x + k * n;
    const double before = __builtin_sqrt(dot(v, v, n));
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t j = 0; j < k; ++j) {
        const double* other = x + j * n;
        const double part = dot(other, v, n);
        for (int64_t i = 0; i < n; ++i) v[i] = v[i] - part * other[i];
      }
    const double norm = __builtin_sqrt(dot(v, v, n));
    const bool dependent = !(norm > DEPENDENT * before);
    for (int64_t i = 0; i < n; ++i) v[i] = dependent ? 0.0 : v[i] / norm;
  }
}

void orthonormalise(const LowRankArgs& x, bool columns, double* vectors) {
  for_chunks(x.layers, x.feedback->threads, [&](int64_t layer) {
    const LowRankLayer& l = x.layer[layer];
    gram_schmidt(vectors + (columns ? l.q : l.p), l.rank, columns ? l.m : l.n);
  });
}

// ---- D = P Q^T -----------------------------------------------------------------------------------

void apply(const LowRankArgs& x, const float* p, const float* q) {
  for_chunks(x.first_tile[x.layers], x.feedback->threads, [&](int64_t index) {
    const Tile t = tile_at(x, index);
    const LowRankLayer& l = *t.layer;
    float sent[BLOCK];
    for_blocks(x, t, [&](int64_t i, int64_t rows, int64_t at, const FeedbackBlock& block,
                         const FeedbackBuffers& buffers) FLCORE_LAMBDA {
      const float* d = sent;
      if (l.rank == 0 && x.values)
        put_values(x, l.values + i * l.m + t.first, block.u, t.width, sent);
      else if (l.rank == 0)
        d = nullptr;
      for (int64_t r = 0; l.rank && r < rows; ++r)
        low_rank_row<F32>(p + l.p + (i + r) * l.rank, q + l.q, l.m, l.rank, t.first, t.width,
                          sent + r * t.width);
      feedback_store(*x.feedback, at, rows * t.width, block, d, buffers.t);
    });
  });
}

}  // namespace
}  // namespace FLCORE_ISA

extern const LowRankFns FLCORE_TABLE(low_rank);
const LowRankFns FLCORE_TABLE(low_rank) = {&FLCORE_ISA::project,  &FLCORE_ISA::sum_columns,
                                           &FLCORE_ISA::back,     &FLCORE_ISA::sum_rows,
                                           &FLCORE_ISA::orthonormalise, &FLCORE_ISA::apply};

}  // namespace flcore
