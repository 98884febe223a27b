// Squared norms and, for all pairs of n client rows, squared distances or inner products.
// Reads every value once: s bytes a coordinate and row (s = bytes of the dtype). Arithmetic: one
// subtraction and one fused multiply-add for each pair of rows and coordinate, n (n - 1) / 2 pairs.
// A tile of 1024 coordinates of all rows lies in the second-level cache while blocks of 4 x 4 pairs
// pass over it, 16 sums in registers for 8 loads.
//
// Distances come from differences: ||x||^2 + ||y||^2 - 2 <x, y> loses every digit of rows that
// share a large common part. Order: lane c mod 16 takes coordinate c of a tile, in float32; the
// lanes are added in a tree; tiles of a chunk are added in float64, chunks exactly (exact.h). So no
// level, thread count, split into layers or order of the rows changes a bit.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/fma.h"
#include "cpu/isa.h"
#include "cpu/layers.h"
#include "cpu/packets.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"
#include "exact.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t CHUNK = 16;               // tiles added in float64 before they are added exactly
constexpr int GROUPS = GRAM_LANES / LANES;  // registers that hold the lanes of one sum
constexpr int ROWS_A = LANES == 16 ? 4 : 2, ROWS_B = 4;  // pairs of a block: what registers hold
constexpr int64_t SIDE = 4;                              // rows of a block of sums in memory, 4 x 4

// ---- sum of the lanes, in a tree: distance 8, 4, 2, 1 ------------------------------------------

// Halves groups of G lanes of two registers: lanes of the first, then of the second.
template <int G>
FLCORE_INLINE vf32 fold(vf32 a, vf32 b) {
#if defined(__clang__)  // has no shuffle by a vector, and makes one of this
  vf32 low, high;
  for (int i = 0; i < LANES; ++i) {
    const int from = i / (G / 2) * G + i % (G / 2), next = from + G / 2;
    low[i] = from < LANES ? a[from] : b[from - LANES];
    high[i] = next < LANES ? a[next] : b[next - LANES];
  }
  return low + high;
#else
  vi32 low, high;
  for (int i = 0; i < LANES; ++i) {
    low[i] = i / (G / 2) * G + i % (G / 2);
    high[i] = low[i] + G / 2;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// v[0 .. LANES - 1] -> one register whose lane p is the sum of the lanes of v[p]
template <int G = LANES>
FLCORE_INLINE void fold_all(vf32* v) {
  if constexpr (G > 1) {
    for (int k = 0; k < G / 2; ++k) v[k] = fold<G>(v[2 * k], v[2 * k + 1]);
    fold_all<G / 2>(v);
  }
}

// Adds the lane sums of COUNT accumulators [GROUPS][COUNT] to `to`.
template <int COUNT>
FLCORE_INLINE void add_lanes(vf32 (*acc)[COUNT], double* to) {
  for (int half = GROUPS / 2; half > 0; half /= 2)
    for (int g = 0; g < half; ++g)
      for (int k = 0; k < COUNT; ++k) acc[g][k] = acc[g][k] + acc[g + half][k];
  for (int first = 0; first < COUNT; first += LANES) {
    vf32 v[LANES];
    for (int k = 0; k < LANES; ++k) v[k] = first + k < COUNT ? acc[0][first + k] : vf32{};
    fold_all(v);
    for (int k = 0; k < LANES && first + k < COUNT; ++k) to[first + k] += double(v[0][k]);
  }
}

// ---- one tile ----------------------------------------------------------------------------------

template <int KIND>
FLCORE_INLINE vf32 term(vf32 a, vf32 b, vf32 sum) {
  if constexpr (KIND == GRAM_PRODUCTS) return vfma(a, b, sum);
  const vf32 d = a - b;
  return vfma(d, d, sum);
}

// ROWS_A x ROWS_B pairs of the rows a and b over one tile; `next` are lines of the following tile.
template <int KIND>
static void block_pairs(const char* const* a, const char* const* b, double* to,
                        const char* const* next, int64_t nexts) {
  constexpr int COUNT = ROWS_A * ROWS_B;
  vf32 acc[GROUPS][COUNT];
  for (int g = 0; g < GROUPS; ++g) {
    vf32 sum[COUNT] = {};
    for (int64_t i = g * LANES; i < GRAM_TILE; i += GRAM_LANES) {
      for (int64_t k = g; k < nexts; k += GROUPS) __builtin_prefetch(next[k] + 4 * i, 0, 2);
      vf32 x[ROWS_A], y[ROWS_B];
      unroll<ROWS_A>([&](auto r) FLCORE_LAMBDA { x[r.value] = load<vf32>(a[r.value] + 4 * i); });
      unroll<ROWS_B>([&](auto r) FLCORE_LAMBDA { y[r.value] = load<vf32>(b[r.value] + 4 * i); });
      unroll<COUNT>([&](auto k) FLCORE_LAMBDA {
        constexpr int K = decltype(k)::value;
        sum[K] = term<KIND>(x[K / ROWS_B], y[K % ROWS_B], sum[K]);
      });
    }
    unroll<COUNT>([&](auto k) FLCORE_LAMBDA { acc[g][k.value] = sum[k.value]; });
  }
  add_lanes<COUNT>(acc, to);
}

// Norms and the pairs of four rows with each other: (0,0) (1,0) (1,1) (2,0) .. as in the triangle.
template <int KIND>
static void diagonal_pairs(const char* const* a, double* to, const char* const* next,
                           int64_t nexts) {
  constexpr int COUNT = 10;
  constexpr int I[COUNT] = {0, 1, 1, 2, 2, 2, 3, 3, 3, 3},
                J[COUNT] = {0, 0, 1, 0, 1, 2, 0, 1, 2, 3};
  vf32 acc[GROUPS][COUNT];
  for (int g = 0; g < GROUPS; ++g) {
    vf32 sum[COUNT] = {};
    for (int64_t i = g * LANES; i < GRAM_TILE; i += GRAM_LANES) {
      for (int64_t k = g; k < nexts; k += GROUPS) __builtin_prefetch(next[k] + 4 * i, 0, 2);
      vf32 x[SIDE];
      unroll<SIDE>([&](auto r) FLCORE_LAMBDA { x[r.value] = load<vf32>(a[r.value] + 4 * i); });
      unroll<COUNT>([&](auto k) FLCORE_LAMBDA {
        constexpr int A = I[decltype(k)::value], B = J[decltype(k)::value];
        sum[k.value] =
            A == B ? vfma(x[A], x[A], sum[k.value]) : term<KIND>(x[A], x[B], sum[k.value]);
      });
    }
    unroll<COUNT>([&](auto k) FLCORE_LAMBDA { acc[g][k.value] = sum[k.value]; });
  }
  add_lanes<COUNT>(acc, to);
}

static void norm_of(const char* a, double* to) {
  vf32 acc[GROUPS][1];
  for (int g = 0; g < GROUPS; ++g) {
    vf32 sum = {};
    for (int64_t i = g * LANES; i < GRAM_TILE; i += GRAM_LANES) {
      __builtin_prefetch(a + 4 * (i + GRAM_TILE), 0, 2);  // the next tile: rows are left too soon
      const vf32 x = load<vf32>(a + 4 * i);
      sum = vfma(x, x, sum);
    }
    acc[g][0] = sum;
  }
  add_lanes<1>(acc, to);
}

// Sums of one pair in float64, without fma: products of float64 are not exact.
template <int KIND>
static double wide_pair(const double* a, const double* b) {
  constexpr int PARTS = GRAM_LANES / LANES64;
  vf64 sum[PARTS] = {};
  for (int64_t i = 0; i < GRAM_TILE; i += GRAM_LANES)
    unroll<PARTS>([&](auto p) FLCORE_LAMBDA {
      const vf64 x = load<vf64>(a + i + p.value * LANES64),
                 y = load<vf64>(b + i + p.value * LANES64);
      const vf64 d = x - y;
      sum[p.value] = sum[p.value] + (KIND == GRAM_PRODUCTS ? x * y : d * d);
    });
  double lanes[GRAM_LANES];
  __builtin_memcpy(lanes, sum, sizeof(lanes));
  for (int half = GRAM_LANES / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] = lanes[k] + lanes[k + half];
  return lanes[0];
}

// ---- work of one thread ------------------------------------------------------------------------

static int64_t blocks_of(int64_t n) { return (n + SIDE - 1) / SIDE; }

struct Workspace {
  const char** p;  // [n padded to whole blocks] the rows of a tile
  char* rows;  // [n][GRAM_TILE] float32 or float64: rows that had to be converted or put together
  float* decoded;  // [n][row_stride(stretch)] packets
  float* work;     // [DECODE_WORK]
  double* part;    // [blocks (blocks + 1) / 2][16] sums of a chunk (wide and norms: [entries])
  int64_t* sums;   // [entries][words] sums of this thread in the current segment
};

static int64_t rows_bytes(int64_t n, bool wide) {
  return whole_lines(n * GRAM_TILE * (wide ? 8 : 4));
}
static int64_t part_bytes(int64_t n) {
  return whole_lines(blocks_of(n) * (blocks_of(n) + 1) / 2 * 16 * 8);
}

// Coordinates of packets decoded at once: whole tiles, at least a bucket of those that need it.
static int64_t stretch_of(const GramArgs& a) {
  const int64_t bucket = a.packets ? whole_bucket(a.packets, a.n) : 1;
  return (bucket + GRAM_TILE - 1) / GRAM_TILE * GRAM_TILE;
}
static int64_t decoded_bytes(const GramArgs& a) {
  return a.packets ? 4 * a.n * row_stride(stretch_of(a)) : 0;
}

static int64_t scratch_bytes(const GramArgs& a) {
  return whole_lines(8 * SIDE * blocks_of(a.n)) + rows_bytes(a.n, a.wide) + part_bytes(a.n) +
         decoded_bytes(a) + (a.packets ? 4 * DECODE_WORK : 0) +
         whole_lines(gram_entries(a.n, GRAM_DISTANCES) * gram_words(a.wide) * 8);
}

static Workspace workspace(const GramArgs& a, int64_t thread) {
  char* base = static_cast<char*>(a.scratch) + thread * scratch_bytes(a);
  char* rows = base + whole_lines(8 * SIDE * blocks_of(a.n));
  char* decoded = rows + rows_bytes(a.n, a.wide);
  char* work = decoded + decoded_bytes(a);
  char* part = work + (a.packets ? 4 * DECODE_WORK : 0);
  return {reinterpret_cast<const char**>(base), rows,
          reinterpret_cast<float*>(decoded),    reinterpret_cast<float*>(work),
          reinterpret_cast<double*>(part),      reinterpret_cast<int64_t*>(part + part_bytes(a.n))};
}

template <int D>
static void convert(const void* x, int64_t first, int64_t m, double* to) {
  int64_t i = 0;
  for (; i + LANES64 <= m; i += LANES64) store(to + i, load_f64<D>(x, first + i));
  for (; i < m; ++i) to[i] = load1_f64<D>(x, first + i);
}

template <int D>
static void convert(const void* x, int64_t first, int64_t m, float* to) {
  int64_t i = 0;
  for (; i + LANES <= m; i += LANES) store(to + i, load_f32<D>(x, first + i));
  for (; i < m; ++i) to[i] = load1<D>(x, first + i);
}

template <class T>
static void convert_row(int dtype, const void* x, int64_t first, int64_t m, T* to) {
  switch (dtype) {
    case F64:
      return convert<F64>(x, first, m, to);
    case F32:
      return convert<F32>(x, first, m, to);
    case F16:
      return convert<F16>(x, first, m, to);
    default:
      return convert<BF16>(x, first, m, to);
  }
}

// Points w.p at coordinates begin .. begin + m - 1 of every packet. The tile begins `first`
// coordinates into a stretch, which is decoded when first is 0; the segment ends at `last`.
template <class T>
static void open_packets(const GramArgs& a, const Workspace& w, int64_t begin, int64_t m,
                         int64_t first, int64_t last) {
  const int64_t stretch = stretch_of(a), stride = row_stride(stretch);
  if (first == 0) {
    const int64_t count = last - begin < stretch ? last - begin : stretch;
    decode_rows(a.packets, a.n, begin, count, w.decoded, stride, w.work);
  }
  T* rows = reinterpret_cast<T*>(w.rows);
  for (int64_t r = 0; r < a.n; ++r) {
    const float* from = w.decoded + r * stride + first;
    w.p[r] = reinterpret_cast<const char*>(from);
    if (sizeof(T) == 4 && m == GRAM_TILE) continue;
    convert<F32>(from, 0, m, rows + r * GRAM_TILE);
    for (int64_t i = m; i < GRAM_TILE; ++i) rows[r * GRAM_TILE + i] = 0;
    w.p[r] = reinterpret_cast<const char*>(rows + r * GRAM_TILE);
  }
}

// The same for rows; what is not float32 in one piece
// is copied, and a short tile ends in zeros, which add nothing.
template <class T>
static void open_rows(const GramArgs& a, const Workspace& w, int64_t begin, int64_t m) {
  int64_t l = find_layer(a.starts, a.layers, begin);
  if (sizeof(T) == 4 && m == GRAM_TILE && a.dtype[l] == F32 && begin + m <= a.starts[l + 1]) {
    for (int64_t r = 0; r < a.n; ++r)
      w.p[r] = static_cast<const char*>(a.rows[r * a.layers + l]) + 4 * (begin - a.starts[l]);
  } else {
    T* rows = reinterpret_cast<T*>(w.rows);
    int64_t done = 0;
    for (; done < m; ++l) {
      const int64_t from = begin + done - a.starts[l], rest = a.starts[l + 1] - begin - done;
      const int64_t length = rest < m - done ? rest : m - done;
      for (int64_t r = 0; r < a.n; ++r)
        if (length > 0)
          convert_row(a.dtype[l], a.rows[r * a.layers + l], from, length,
                      rows + r * GRAM_TILE + done);
      done += length;
    }
    for (int64_t r = 0; r < a.n; ++r) {
      for (int64_t i = m; i < GRAM_TILE; ++i) rows[r * GRAM_TILE + i] = 0;
      w.p[r] = reinterpret_cast<const char*>(rows + r * GRAM_TILE);
    }
  }
}

// Tile `tile` of a chunk; the segment ends at `last`.
template <class T>
static void open_tile(const GramArgs& a, const Workspace& w, int64_t begin, int64_t tile,
                      int64_t last) {
  const int64_t m = last - begin < GRAM_TILE ? last - begin : GRAM_TILE;
  if (a.packets)
    open_packets<T>(a, w, begin, m, tile * GRAM_TILE % stretch_of(a), last);
  else
    open_rows<T>(a, w, begin, m);
  for (int64_t r = a.n; r < SIDE * blocks_of(a.n); ++r) w.p[r] = w.p[a.n - 1];  // not used
}

template <int KIND>
static void tile_pairs(const GramArgs& a, const Workspace& w) {
  const int64_t blocks = blocks_of(a.n), all = blocks * (blocks + 1) / 2;
  double* to = w.part;
  int64_t number = 0;
  for (int64_t i = 0; i < blocks; ++i)
    for (int64_t j = 0; j <= i; ++j, to += 16, ++number) {
      const char* next[SIDE];  // each block asks for some rows of the next tile
      int64_t nexts = 0;
      for (int64_t r = number; r < a.n && nexts < SIDE; r += all)
        next[nexts++] = w.p[r] + 4 * GRAM_TILE;
      if (i == j)
        diagonal_pairs<KIND>(w.p + SIDE * i, to, next, nexts);
      else
        for (int64_t r = 0; r < SIDE; r += ROWS_A)
          block_pairs<KIND>(w.p + SIDE * i + r, w.p + SIDE * j, to + r * ROWS_B, next,
                            r ? 0 : nexts);
    }
}

template <int KIND>
static void tile_wide(const GramArgs& a, const Workspace& w) {
  const auto row = [&](int64_t r) { return reinterpret_cast<const double*>(w.p[r]); };
  double* to = w.part;
  for (int64_t i = 0; i < a.n; ++i) {
    for (int64_t j = 0; j < i && KIND != GRAM_NORMS; ++j) *to++ += wide_pair<KIND>(row(i), row(j));
    *to++ += wide_pair<GRAM_PRODUCTS>(row(i), row(i));
  }
}

static void add_tile(const GramArgs& a, const Workspace& w, int64_t begin, int64_t tile,
                     int64_t last) {
  if (a.wide) {
    open_tile<double>(a, w, begin, tile, last);
    if (a.kind == GRAM_NORMS) return tile_wide<GRAM_NORMS>(a, w);
    return a.kind == GRAM_PRODUCTS ? tile_wide<GRAM_PRODUCTS>(a, w)
                                   : tile_wide<GRAM_DISTANCES>(a, w);
  }
  open_tile<float>(a, w, begin, tile, last);
  if (a.kind == GRAM_NORMS)
    for (int64_t r = 0; r < a.n; ++r) norm_of(w.p[r], w.part + r);
  else if (a.kind == GRAM_PRODUCTS)
    tile_pairs<GRAM_PRODUCTS>(a, w);
  else
    tile_pairs<GRAM_DISTANCES>(a, w);
}

// Where tile_* put the sum of rows i >= j.
static double part_of(const GramArgs& a, const double* part, int64_t i, int64_t j) {
  if (a.kind == GRAM_NORMS) return part[i];
  if (a.wide) return part[i * (i + 1) / 2 + j];
  const int64_t bi = i / SIDE, bj = j / SIDE, x = i % SIDE, y = j % SIDE;
  return part[(bi * (bi + 1) / 2 + bj) * 16 + (bi == bj ? x * (x + 1) / 2 + y : x * SIDE + y)];
}

static void close_chunk(const GramArgs& a, const Workspace& w) {
  const ExactForm form = gram_form(a.wide);
  int64_t* to = w.sums;
  for (int64_t i = 0; i < a.n; ++i)
    for (int64_t j = a.kind == GRAM_NORMS ? i : 0; j <= i; ++j, to += form.words())
      exact_add(to, form, part_of(a, w.part, i, j));
}

static void gram(const GramArgs& a) {
  const int64_t chunk = CHUNK * GRAM_TILE, words = gram_entries(a.n, a.kind) * gram_words(a.wide);
  a.first_chunk[0] = 0;
  for (int64_t s = 0; s < a.segments; ++s) {
    const int64_t length = a.segment_starts[s + 1] - a.segment_starts[s];
    a.first_chunk[s + 1] = a.first_chunk[s] + (length + chunk - 1) / chunk;
  }
  const int64_t chunks = a.first_chunk[a.segments];
  for_ranges(chunks, a.threads, [&](int64_t thread, int64_t first, int64_t end) {
    const Workspace w = workspace(a, thread);
    int64_t segment = -1;
    const auto flush = [&] {
      if (segment < 0) return;
      int64_t* to = a.sums + segment * words;
      for (int64_t k = 0; k < words; ++k)
        if (w.sums[k]) __atomic_fetch_add(to + k, w.sums[k], __ATOMIC_RELAXED);
    };
    for (int64_t c = first; c < end; ++c) {
      const int64_t s = find_layer(a.first_chunk, a.segments, c);
      if (s != segment) {
        flush();
        __builtin_memset(w.sums, 0, size_t(words) * 8);
        segment = s;
      }
      __builtin_memset(w.part, 0, size_t(part_bytes(a.n)));
      const int64_t last = a.segment_starts[s + 1];
      int64_t begin = a.segment_starts[s] + (c - a.first_chunk[s]) * chunk;
      for (int64_t t = 0; t < CHUNK && begin < last; ++t, begin += GRAM_TILE)
        add_tile(a, w, begin, t, last);
      close_chunk(a, w);
    }
    flush();
  });
}

}  // namespace FLCORE_ISA

extern const GramFns FLCORE_TABLE(gram);
const GramFns FLCORE_TABLE(gram) = {&FLCORE_ISA::gram, &FLCORE_ISA::scratch_bytes};

}  // namespace flcore
