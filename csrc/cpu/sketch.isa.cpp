// Count sketches of updates, and the largest coordinates that a sketch tells of.
//   sketch     cells[i][column_i(j)] += sign_i(j) u_j     reads u once a row, r scattered adds each
//   estimate   median over i of sign_i(j) cells[i][column_i(j)]        (decode_sketch.h)
//   histogram, collect   the same estimates on their way to a top-k: never written to memory
//   scatter    cells of a few coordinates, added to or set to 0
// A unit of work of `sketch` is one row and one part of the coordinates with cells of its own: the
// adds of a cell happen in the order of the coordinates, parts are added in order, so that neither
// threads nor level change a bit, without atomics and without sorting. Only a row is written at a
// time: 4 bytes a column stay in L2 where r rows would not.
// Source: Rothchild et al., "FetchSGD", ICML 2020, arXiv 2007.07682; Charikar, Chen, Farach-Colton,
// "Finding frequent items in data streams", ICALP 2002.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/decode_sketch.h"
#include "cpu/feedback.h"
#include "cpu/layers.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t BLOCK = SKETCH_BLOCK;

// ---- table -------------------------------------------------------------------------------------

bool sketch(const SketchArgs& x) {
  const FeedbackArgs& f = *x.feedback;
  const SketchHash& h = x.hash;
  const int64_t blocks = (f.numel + BLOCK - 1) / BLOCK, size = h.rows * h.columns;
  int32_t bad = 0;
  for_chunks(h.rows * x.parts, f.threads, [&](int64_t unit) {
    const int64_t row = unit % h.rows, part = unit / h.rows;
    float* cells = (part == 0 ? x.cells : x.more + (part - 1) * size) + row * h.columns;
    __builtin_memset(cells, 0, size_t(h.columns) * sizeof(float));
    const int64_t begin = blocks * part / x.parts * BLOCK;
    int64_t end = blocks * (part + 1) / x.parts * BLOCK;
    end = end < f.numel ? end : f.numel;
    if (begin >= end) return;
    float memory[FEEDBACK_PARTS * BLOCK];
    const FeedbackBuffers buffers = feedback_buffers(memory, BLOCK);
    uint32_t columns[BLOCK], signs[BLOCK];
    int64_t layer = find_layer(f.starts, f.layers, begin);
    bool finite = true;
    for (int64_t at = begin; at < end; at += BLOCK) {
      const int64_t count = at + BLOCK < end ? BLOCK : end - at;
      const FeedbackBlock block = feedback_load(f, at, count, layer, buffers);
      finite = finite && block.finite;
      sketch_places(h, row, at, count, columns, signs);
      for (int64_t j = 0; j < count; ++j) {
        const float value = float_of(load<uint32_t>(block.u + j) ^ signs[j]);
        cells[columns[j]] = cells[columns[j]] + value;
      }
    }
    if (!finite) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
  });
  if (x.parts > 1) {
    const int64_t pieces = (size + BLOCK - 1) / BLOCK;
    for_chunks(pieces, f.threads, [&](int64_t piece) {
      const int64_t stop = (piece + 1) * BLOCK < size ? (piece + 1) * BLOCK : size;
      for (int64_t part = 1; part < x.parts; ++part) {
        const float* from = x.more + (part - 1) * size;
        for (int64_t i = piece * BLOCK; i < stop; ++i) x.cells[i] = x.cells[i] + from[i];
      }
    });
  }
  return bad == 0;
}

void scatter(const SketchHash& h, const int64_t* index, const float* values, int64_t count,
             float* cells, int threads) {
  for_chunks(h.rows, threads, [&](int64_t row) {
    const PhiloxStream stream = sketch_stream(h.seed, row);
    float* to = cells + row * h.columns;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t word = philox_block(stream, uint32_t(index[i] >> 2)).w[index[i] & 3];
      float& cell = to[sketch_column(word, uint64_t(h.columns))];
      cell = values ? cell + float_of(bits_of(values[i]) ^ (word << 31)) : 0.0f;
    }
  });
}

// ---- estimates ---------------------------------------------------------------------------------

void estimate(const SketchTable& x, int64_t begin, int64_t count, float* out) {
  for_chunks((count + BLOCK - 1) / BLOCK, x.threads, [&](int64_t block) {
    const int64_t at = block * BLOCK;
    sketch_estimates(x.hash, x.cells, begin + at, count - at < BLOCK ? count - at : BLOCK,
                     out + at);
  });
}

// visit(first coordinate, estimates, count) for the blocks of a tile
template <class Visit>
FLCORE_INLINE void for_estimates(const SketchTable& x, int64_t tile, const Visit& visit) {
  const int64_t begin = tile * SPARSE_TILE;
  const int64_t end = begin + SPARSE_TILE < x.numel ? begin + SPARSE_TILE : x.numel;
  float values[BLOCK];
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t count = at + BLOCK < end ? BLOCK : end - at;
    sketch_estimates(x.hash, x.cells, at, count, values);
    visit(at, values, count);
  }
}

int64_t tile_count(const SketchTable& x) { return (x.numel + SPARSE_TILE - 1) / SPARSE_TILE; }

void histogram(const SketchTable& x, int level, uint32_t prefix, uint32_t* counts) {
  const int shift = SPARSIFY_SHIFT[level], width = SPARSIFY_WIDTH[level];
  for_chunks(tile_count(x), x.threads, [&](int64_t tile) {
    uint32_t* bins = counts + tile * SPARSIFY_BINS;
    __builtin_memset(bins, 0, SPARSIFY_BINS * sizeof(uint32_t));
    for_estimates(x, tile, [&](int64_t, const float* values, int64_t count) FLCORE_LAMBDA {
      for (int64_t j = 0; j < count; ++j) {
        const uint32_t key = bits_of(values[j]) & 0x7fffffffu;
        if (key >> (shift + width) == prefix) ++bins[(key >> shift) & ((1u << width) - 1u)];
      }
    });
  });
}

void collect(const SketchTable& x, uint32_t cut, const int64_t* quota, const int64_t* starts,
             int64_t* index, float* found) {
  for_chunks(tile_count(x), x.threads, [&](int64_t tile) {
    int64_t at = starts[tile], left = quota[tile];
    if (at == starts[tile + 1]) return;
    for_estimates(x, tile, [&](int64_t first, const float* values, int64_t count) FLCORE_LAMBDA {
      for (int64_t j = 0; j < count; ++j) {
        const uint32_t key = bits_of(values[j]) & 0x7fffffffu;
        if (key < cut || (key == cut && left-- <= 0)) continue;
        index[at] = first + j;
        found[at++] = values[j];
      }
    });
  });
}

}  // namespace
}  // namespace FLCORE_ISA

extern const SketchFns FLCORE_TABLE(sketch);
const SketchFns FLCORE_TABLE(sketch) = {&FLCORE_ISA::sketch, &FLCORE_ISA::estimate,
                                        &FLCORE_ISA::histogram, &FLCORE_ISA::collect,
                                        &FLCORE_ISA::scatter};

}  // namespace flcore
