// Squared norms, squared distances and inner products of n client rows on the GPU (GramArgs in
// api.h), in one read: n*s bytes a coordinate (s = bytes of the dtype) for up to 32 rows. More rows
// are taken by pairs of blocks of 32, so that a value is read n / 32 times, from L2 when the blocks
// that need it run side by side.
//
// A unit of work is a stretch of one layer. Its block brings tiles of columns to shared memory,
// transposed, so that four rows of a column are one 16-byte load; a thread owns 4 x 4 pairs of rows
// and every G-th column. That is a difference and a fused multiply-add, or the latter alone, a pair
// and column: a memory-bound H100 has time for the differences of about 32 rows.
//
// Exactness: a thread adds at most 64 terms in the working precision, then goes over to float64 for
// everything that follows; differences, never norms minus products. Each unit leaves its matrix in
// a workspace and a second kernel adds them in a fixed order, no atomics: the same bits in every run
// and on every device, though not those of the CPU kernel.
#include <vector>

#include "launch.h"
#include "row_table.cuh"

namespace flcore {
namespace cuda {

constexpr int THREADS = 256;
constexpr int SUB = 4;           // rows of a thread, on each side of its pairs
constexpr int ROW_BLOCK = 32;    // rows of a block, on each side
constexpr int64_t TERMS = 64;    // terms of a sum in the working precision
constexpr int64_t TILE_BYTES = 40 << 10;  // of shared memory: with the totals three blocks fit
constexpr int64_t UNITS = 2048;  // stretches a call is cut into, and at most one a layer more
constexpr int64_t WORKSPACE = int64_t(1) << 27;  // bytes beyond which they are made longer

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int RESIDENT = 2;  // blocks a multiprocessor has shared memory for
#else
constexpr int RESIDENT = 3;
#endif

extern __shared__ uint4 shared_words[];

struct GramWork {
  int n;
  int columns_log2;    // columns of a tile
  int64_t unit_tiles;  // tiles of a unit
  int64_t first_slot;  // of the workspace, for unit 0 of this launch
  int64_t entries;     // of a matrix in the workspace: gram_entries
  double* partial;     // [slots][entries]
};

__host__ __device__ constexpr int sub_blocks(int rows) { return (rows + SUB - 1) / SUB; }

// Values from one column of a tile to the next: an odd number of 16-byte words, so that a column a
// thread is written and read without conflicts.
template <class Real>
__host__ __device__ constexpr int tile_stride(int subs) {
  return ((subs * SUB * int(sizeof(Real)) / 16) | 1) * (16 / int(sizeof(Real)));
}

// Row and column, at or left of the diagonal, of the k-th entry of a lower triangle.
__device__ __forceinline__ void triangle_entry(int k, int& row, int& column) {
  row = 0;
  while ((row + 1) * (row + 2) / 2 <= k) ++row;
  column = k - row * (row + 1) / 2;
}

// ---- tiles -------------------------------------------------------------------------------------

template <class Real>
__device__ __forceinline__ void load_sub(Real (&x)[SUB], const Real* src) {
  uint4 words[sizeof x / 16];
#pragma unroll
  for (int k = 0; k < int(sizeof x / 16); ++k) words[k] = reinterpret_cast<const uint4*>(src)[k];
  memcpy(x, words, sizeof x);
}

template <class Real>
__device__ __forceinline__ void store_sub(Real* dst, const Real (&x)[SUB]) {
  uint4 words[sizeof x / 16];
  memcpy(words, x, sizeof x);
#pragma unroll
  for (int k = 0; k < int(sizeof x / 16); ++k) reinterpret_cast<uint4*>(dst)[k] = words[k];
}

// tile[c * stride + i] <- coordinate begin + c of row first + i, zeros for rows beyond the last one
template <class Real, class Table>
__device__ __forceinline__ void load_tile(const Table& t, int layer, int64_t begin, int columns,
                                          int columns_log2, int first, int rows, Real* tile) {
  constexpr int LOADS [[maybe_unused]] = 16 / sizeof(Real);  // of four rows, in flight
  const int subs = sub_blocks(rows), stride = tile_stride<Real>(subs);
  with_dtype<Real>(t.dtype(layer), [&](auto d) {
    constexpr int D = decltype(d)::value;
#pragma unroll LOADS
    for (int i = int(threadIdx.x); i < subs << columns_log2; i += THREADS) {
      const int c = i & ((1 << columns_log2) - 1), sub = i >> columns_log2;
      const int64_t at = begin + c;
      Real x[SUB];
#pragma unroll
      for (int k = 0; k < SUB; ++k) {
        x[k] = Real(0);
        if (c < columns && SUB * sub + k < rows)
          x[k] = widen<D, Real>(
              __ldg(static_cast<const Stored<D>*>(t.row(layer, first + SUB * sub + k)) + at));
      }
      store_sub(tile + c * stride + SUB * sub, x);
    }
  });
}

// ---- pairs -------------------------------------------------------------------------------------

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// sum[a][b] += the term of rows x[a] and y[b]. `diagonal`: x and y are the same rows, and sum[a][a]
// the squared norm of row a.
template <int KIND, class Real>
__device__ __forceinline__ void add_terms(Real (&sum)[SUB][SUB], const Real (&x)[SUB],
                                          const Real (&y)[SUB], bool diagonal) {
#pragma unroll
  for (int a = 0; a < SUB; ++a)
#pragma unroll
    for (int b = 0; b < SUB; ++b) {
      if constexpr (KIND == GRAM_NORMS) {
        if (a == b) sum[a][b] = fused(x[a], x[a], sum[a][b]);
      } else if constexpr (KIND == GRAM_PRODUCTS) {
        sum[a][b] = fused(x[a], y[b], sum[a][b]);
      } else {
        const Real difference = x[a] - (a == b && diagonal ? Real(0) : y[b]);
        sum[a][b] = fused(difference, difference, sum[a][b]);
      }
    }
}

// A thread's float64 totals, in shared memory: registers are for loads. Slot k of the threads of a
// block lies side by side.
template <int KIND>
__device__ constexpr int total_slot(int a, int b) {
  return (KIND == GRAM_NORMS ? a : SUB * a + b) * THREADS;
}
constexpr int total_slots(int kind) { return kind == GRAM_NORMS ? SUB : SUB * SUB; }

template <int KIND, class Real>
__device__ __forceinline__ void flush(Real (&sum)[SUB][SUB], double* totals) {
#pragma unroll
  for (int a = 0; a < SUB; ++a)
#pragma unroll
    for (int b = 0; b < SUB; ++b)
      if (KIND != GRAM_NORMS || a == b) {
        totals[total_slot<KIND>(a, b) + int(threadIdx.x)] += double(sum[a][b]);
        sum[a][b] = Real(0);
      }
}

// Adds the totals of all groups of threads, halving their number: thread p of group 0 gets the sum
// for pairs p. A group is `pairs` neighbouring threads.
template <int KIND>
__device__ __forceinline__ void add_groups(double* totals, int group, int groups, int pairs) {
  for (int left = groups; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (group + half < left) {
#pragma unroll
      for (int k = 0; k < total_slots(KIND); ++k)
        totals[k * THREADS + int(threadIdx.x)] +=
            totals[k * THREADS + int(threadIdx.x) + half * pairs];
    }
    left = half;
  }
}

// ---- kernels -----------------------------------------------------------------------------------

// One block for each unit and pair of row blocks (for norms each row block), the pairs of a unit
// side by side. Shared memory: double [total_slots][THREADS], then one tile of rows, or two.
template <int KIND, class Real>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    gram_units(const __grid_constant__ LargeRows t, const GramWork w) {
  const int row_blocks = (w.n + ROW_BLOCK - 1) / ROW_BLOCK;
  const int block_pairs = KIND == GRAM_NORMS ? row_blocks : row_blocks * (row_blocks + 1) / 2;
  const int64_t unit = blockIdx.x / block_pairs;
  int i = int(blockIdx.x % block_pairs), j = i;
  if (KIND != GRAM_NORMS) triangle_entry(i, i, j);
  const int first_i = ROW_BLOCK * i, first_j = ROW_BLOCK * j;
  const int rows_i = min(ROW_BLOCK, w.n - first_i), rows_j = min(ROW_BLOCK, w.n - first_j);
  const int subs_i = sub_blocks(rows_i), subs_j = sub_blocks(rows_j);

  const int pairs = KIND == GRAM_NORMS ? subs_i
                    : i == j           ? subs_i * (subs_i + 1) / 2
                                       : subs_i * subs_j;
  const int groups = THREADS / pairs, group = int(threadIdx.x) / pairs;
  const int pair = int(threadIdx.x) % pairs;
  int sub_i = pair, sub_j = pair;
  if (KIND != GRAM_NORMS && i == j) triangle_entry(pair, sub_i, sub_j);
  if (KIND != GRAM_NORMS && i != j) sub_i = pair / subs_j, sub_j = pair % subs_j;
  const bool diagonal = i == j && sub_i == sub_j;

  const int columns = 1 << w.columns_log2;
  const int stride_i = tile_stride<Real>(subs_i), stride_j = tile_stride<Real>(subs_j);
  double* totals = reinterpret_cast<double*>(shared_words);
  Real* tile_i = reinterpret_cast<Real*>(totals + total_slots(KIND) * THREADS);
  Real* tile_j = i == j ? tile_i : tile_i + columns * stride_i;

  const int layer = t.find(unit);
  const int64_t numel = t.numel(layer), tiles = (numel + columns - 1) >> w.columns_log2;
  const int64_t first_tile = (unit - t.first_unit(layer)) * w.unit_tiles;
  const int64_t last_tile = first_tile + w.unit_tiles < tiles ? first_tile + w.unit_tiles : tiles;
  const int between = max(1, int(TERMS) / ((columns + groups - 1) / groups));  // tiles, of flushes

  Real sum[SUB][SUB] = {};
  int pending = 0;
#pragma unroll
  for (int k = 0; k < total_slots(KIND); ++k) totals[k * THREADS + int(threadIdx.x)] = 0.0;
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t begin = tile << w.columns_log2;
    const int valid = numel - begin < columns ? int(numel - begin) : columns;
    __syncthreads();
    load_tile(t, layer, begin, valid, w.columns_log2, first_i, rows_i, tile_i);
    if (i != j) load_tile(t, layer, begin, valid, w.columns_log2, first_j, rows_j, tile_j);
    __syncthreads();
    if (group < groups) {
#pragma unroll 1
      for (int c = group; c < valid; c += groups) {
        Real x[SUB], y[SUB];
        load_sub(x, tile_i + c * stride_i + SUB * sub_i);
        load_sub(y, tile_j + c * stride_j + SUB * sub_j);
        add_terms<KIND>(sum, x, y, diagonal);
      }
    }
    if (++pending == between) {
      flush<KIND>(sum, totals);
      pending = 0;
    }
  }
  flush<KIND>(sum, totals);
  add_groups<KIND>(totals, group, groups, pairs);
  if (group > 0) return;
  double* matrix = w.partial + (w.first_slot + unit) * w.entries;
#pragma unroll
  for (int a = 0; a < SUB; ++a)
#pragma unroll
    for (int b = 0; b < SUB; ++b) {
      const int64_t row = first_i + SUB * sub_i + a, column = first_j + SUB * sub_j + b;
      if (row >= w.n || column > row) continue;
      if (KIND == GRAM_NORMS && row != column) continue;
      matrix[KIND == GRAM_NORMS ? row : row * (row + 1) / 2 + column] =
          totals[total_slot<KIND>(a, b) + int(threadIdx.x)];
    }
}

constexpr int SUM_ENTRIES = 32, SUM_LANES = THREADS / SUM_ENTRIES;
constexpr int SUM_SEGMENTS = 400;  // of a launch

struct SegmentSlots {
  int64_t first[SUM_SEGMENTS + 1];
};

// out[segment][entry] = sum of the entry over the slots of the segment: lane k takes every
// SUM_LANES-th slot from the k-th on, then the lanes are added in order.
__global__ void __launch_bounds__(THREADS)
    gram_sums(const __grid_constant__ SegmentSlots slots, const double* partial, int64_t entries,
              int64_t entry_blocks, double* out) {
  double* shared = reinterpret_cast<double*>(shared_words);
  const int segment = int(blockIdx.x / entry_blocks);
  const int64_t entry = blockIdx.x % entry_blocks * SUM_ENTRIES + threadIdx.x % SUM_ENTRIES;
  double sum = 0.0;
  if (entry < entries) {
    const int64_t last = slots.first[segment + 1];
#pragma unroll 8
    for (int64_t slot = slots.first[segment] + threadIdx.x / SUM_ENTRIES; slot < last;
         slot += SUM_LANES)
      sum += partial[slot * entries + entry];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= SUM_ENTRIES || entry >= entries) return;
  for (int k = 1; k < SUM_LANES; ++k) sum += shared[k * SUM_ENTRIES + int(threadIdx.x)];
  out[segment * entries + entry] = sum;
}

// ---- launchers ---------------------------------------------------------------------------------

// How the layers are cut: a function of the arguments alone, never of the device.
struct GramShape {
  int columns_log2;
  size_t tile_bytes;
  int64_t unit_tiles, entries;

  explicit GramShape(const GramArgs& a) : entries(gram_entries(a.n, a.kind)) {
    const int subs = sub_blocks(int(a.n < ROW_BLOCK ? a.n : ROW_BLOCK));
    const int64_t column = a.wide ? tile_stride<double>(subs) * sizeof(double)
                                  : tile_stride<float>(subs) * sizeof(float);
    const bool pairs = a.n > ROW_BLOCK && a.kind != GRAM_NORMS;
    columns_log2 = 0;
    while ((pairs ? 2 : 1) * column << (columns_log2 + 1) <= TILE_BYTES) ++columns_log2;
    tile_bytes = size_t((pairs ? 2 : 1) * column << columns_log2);
    int64_t tiles = 0;
    for (int64_t l = 0; l < a.layers; ++l) tiles += tiles_of(a.starts[l + 1] - a.starts[l]);
    const int64_t fit = WORKSPACE / int64_t(sizeof(double)) / entries;
    const int64_t units = fit < 1 ? 1 : fit < UNITS ? fit : UNITS;
    unit_tiles = tiles > units ? (tiles + units - 1) / units : 1;
  }
  int64_t tiles_of(int64_t numel) const {
    return (numel + (int64_t(1) << columns_log2) - 1) >> columns_log2;
  }
  int64_t units_of(int64_t numel) const {
    return (tiles_of(numel) + unit_tiles - 1) / unit_tiles;
  }
};

int64_t gram_workspace(const GramArgs& a) {
  const GramShape shape(a);
  int64_t units = 0;
  for (int64_t l = 0; l < a.layers; ++l) units += shape.units_of(a.starts[l + 1] - a.starts[l]);
  return units * shape.entries;
}

template <int KIND, class Real>
static void launch_units(const GramArgs& a, const GramShape& shape, double* partial,
                         cudaStream_t stream) {
  const int64_t row_blocks = (a.n + ROW_BLOCK - 1) / ROW_BLOCK;
  const int64_t block_pairs = KIND == GRAM_NORMS ? row_blocks : row_blocks * (row_blocks + 1) / 2;
  const size_t totals = size_t(total_slots(KIND)) * THREADS * sizeof(double);
  GramWork work{int(a.n), shape.columns_log2, shape.unit_tiles, 0, shape.entries, partial};
  const auto numel = [&](int64_t l) { return a.starts[l + 1] - a.starts[l]; };
  for_row_tables<LargeRows>(
      {a.n, a.layers, a.dtype, a.rows, nullptr}, numel,
      [&](int64_t l) { return shape.units_of(numel(l)); }, [&](int64_t) { return uint64_t(1); },
      [&](const LargeRows& t) {
        start("gram_units", &gram_units<KIND, Real>, t.units * block_pairs, THREADS,
              totals + shape.tile_bytes, stream, t, work);
        work.first_slot += t.units;
      });
}

template <class Real>
static void launch_kind(const GramArgs& a, const GramShape& shape, double* partial,
                        cudaStream_t stream) {
  if (a.kind == GRAM_NORMS)
    launch_units<GRAM_NORMS, Real>(a, shape, partial, stream);
  else if (a.kind == GRAM_DISTANCES)
    launch_units<GRAM_DISTANCES, Real>(a, shape, partial, stream);
  else
    launch_units<GRAM_PRODUCTS, Real>(a, shape, partial, stream);
}

void launch_gram(const GramArgs& a, double* partial, double* out, int device, uintptr_t stream) {
  FLCORE_CHECK(a.n <= ROW_TABLE_MAX_ROWS, "gram: at most ", ROW_TABLE_MAX_ROWS,
               " client rows on a GPU, got ", a.n);
  const GramShape shape(a);
  std::vector<int64_t> first(size_t(a.segments) + 1);  // slot of each segment, then their number
  int64_t units = 0, s = 0;
  for (int64_t l = 0; l < a.layers; ++l) {
    while (s < a.segments && a.segment_starts[s] <= a.starts[l]) first[size_t(s++)] = units;
    FLCORE_CHECK(s == a.segments || a.starts[l + 1] <= a.segment_starts[s],
                 "gram: segments must be whole layers");
    FLCORE_CHECK(a.wide || a.dtype[l] != F64, "gram: float64 layers need float64 sums");
    units += shape.units_of(a.starts[l + 1] - a.starts[l]);
  }
  while (s <= a.segments) first[size_t(s++)] = units;
  const DeviceGuard guard(device);
  const cudaStream_t queue = reinterpret_cast<cudaStream_t>(stream);
  if (a.wide)
    launch_kind<double>(a, shape, partial, queue);
  else
    launch_kind<float>(a, shape, partial, queue);
  const int64_t entry_blocks = (shape.entries + SUM_ENTRIES - 1) / SUM_ENTRIES;
  for (s = 0; s < a.segments; s += SUM_SEGMENTS) {
    const int64_t count = a.segments - s < SUM_SEGMENTS ? a.segments - s : SUM_SEGMENTS;
    SegmentSlots slots;
    for (int64_t k = 0; k <= count; ++k) slots.first[k] = first[size_t(s + k)];
    start("gram_sums", &gram_sums, count * entry_blocks, THREADS, THREADS * sizeof(double), queue,
          slots, static_cast<const double*>(partial), shape.entries, entry_blocks,
          out + s * shape.entries);
  }
}

}  // namespace cuda
}  // namespace flcore
