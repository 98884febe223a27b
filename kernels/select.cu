// Order statistics of every coordinate on the GPU (SelectArgs in api.h): median, trimmed mean, and
// the mean of the values nearest to either, over n client rows, mixed first when asked for. Reads
// every value once and writes one row: n*s + s bytes a coordinate (s = bytes of the dtype).
//   up to 32 values   in registers, one to four coordinates a thread, a sorting network specialised
//                     for n, for the median pruned to it; nearest values are looked up in shared
//                     memory, which can be indexed at run time
//   more, float64,    a thread's column of shared memory: runs of 32 sorted in registers, then
//   or mixed          merged; up to 1024 values, fewer threads the more there are
//
// Work besides memory: a compare-exchange is two instructions at half rate; 16 values take 63, 32
// take 191. A memory-bound H100 has some 35 instructions to spend on a float32 value.
//
// Exactness: comparing is exact, sums and quotients are rounded one by one in the order of the CPU
// kernel: its bits. Minimum and maximum lose a NaN, so a coordinate that holds one is noted before.
#include <utility>

#include "launch.h"
#include "row_table.cuh"
#include "sorted.cuh"

namespace flcore {
namespace cuda {

constexpr int THREADS = 256;
constexpr int BLOCKS_PER_SM = 8;
constexpr int MAX_WIRES = 32;        // values that are sorted in registers only
constexpr int COLUMN_THREADS = 128;  // of a block that works in shared memory, at most

// Neighbouring coordinates of a thread: as many as registers hold, up to 16 bytes a load.
constexpr int coordinates(int n) { return n <= 8 ? 4 : n <= 24 ? 2 : 1; }

extern __shared__ uint4 shared_words[];

// ---- N neighbouring values between memory and registers ----------------------------------------

template <int BYTES>
struct WordOf {
  typedef uint16_t type;
};
template <>
struct WordOf<4> {
  typedef uint32_t type;
};
template <>
struct WordOf<8> {
  typedef uint2 type;
};
template <>
struct WordOf<16> {
  typedef uint4 type;
};

template <int N, class T>
__device__ __forceinline__ void load_word(T (&dst)[N], const T* src) {
  typedef typename WordOf<int(N * sizeof(T))>::type Word;
  static_assert(sizeof(Word) == sizeof dst, "2, 4, 8 or 16 bytes");
  const Word word = __ldcs(reinterpret_cast<const Word*>(src));
  memcpy(dst, &word, sizeof word);
}

template <int N, class T>
__device__ __forceinline__ void store_word(T* dst, const T (&src)[N]) {
  typedef typename WordOf<int(N * sizeof(T))>::type Word;
  static_assert(sizeof(Word) == sizeof src, "2, 4, 8 or 16 bytes");
  Word word;
  memcpy(&word, src, sizeof word);
  *reinterpret_cast<Word*>(dst) = word;
}

// ---- up to 32 values in registers --------------------------------------------------------------

// v[k][i] <- value of row i at coordinate at + k, or 0 for k >= valid; whole: one load a row
template <int N, int C>
__device__ __forceinline__ void read_rows(const SmallRows& t, int layer, int64_t at, int valid,
                                          bool whole, float (&v)[C][N]) {
  with_dtype<float>(t.dtype(layer), [&](auto d) {
    constexpr int D = decltype(d)::value;
    Stored<D> x[N][C];
    if (whole) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        load_word(x[i], static_cast<const Stored<D>*>(t.row(layer, i)) + at);
    } else if constexpr (C > 1) {
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int k = 0; k < C; ++k)
          x[i][k] = k < valid ? __ldcs(static_cast<const Stored<D>*>(t.row(layer, i)) + at + k)
                              : Stored<D>(0);
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int k = 0; k < C; ++k) v[k][i] = widen<D, float>(x[i][k]);
  });
}

template <int C>
__device__ __forceinline__ void write_out(const SmallRows& t, int layer, int64_t at, int valid,
                                          bool whole, const float (&result)[C]) {
  with_dtype<float>(t.dtype(layer), [&](auto d) {
    constexpr int D = decltype(d)::value;
    Stored<D>* out = static_cast<Stored<D>*>(t.out(layer)) + at;
    Stored<D> y[C];
#pragma unroll
    for (int k = 0; k < C; ++k) y[k] = narrow<D>(result[k]);
    if (whole) {
      store_word(out, y);
    } else if constexpr (C > 1) {
#pragma unroll
      for (int k = 0; k < C; ++k)
        if (k < valid) out[k] = y[k];
    }
  });
}

// The statistic of one coordinate. MEDIAN: the network is pruned to the middle.
template <int N, bool MEDIAN>
__device__ __forceinline__ float statistic_of(float (&v)[N], const SelectPlan& p, float* column) {
  constexpr int LOWER = (N - 1) / 2, UPPER = N / 2;
  constexpr int FIRST = MEDIAN ? LOWER : 0, LAST = MEDIAN ? UPPER : N - 1;
  typedef SortNetwork<N, FIRST, LAST> Net;
  float a[N];
  run_network<Net, FIRST, LAST>(v, a);
  const float center = N % 2 ? a[LOWER] : middle_of(a[LOWER], a[UPPER], p.median);
  if constexpr (MEDIAN) {
    return center;
  } else {
    const float mean = p.op == SELECT_NEAR_MEDIAN ? center : trimmed_mean(a, p.f);
    if (p.op == SELECT_TRIMMED_MEAN) return mean;
    const Column<float> sorted{column, THREADS};
#pragma unroll
    for (int i = 0; i < N; ++i) sorted[i] = a[i];
    return nearest_mean(sorted, N, p.keep, mean);
  }
}

// Shared memory: float [N][THREADS] for the nearest values, of which a thread touches its own only.
template <int N, bool MEDIAN>
__global__ void __launch_bounds__(THREADS, N * coordinates(N) >= 32 ? 2 : 3)
    select_registers(const __grid_constant__ SmallRows t, const SelectPlan plan, int32_t* flags) {
  constexpr int C = coordinates(N);
  float* column = reinterpret_cast<float*>(shared_words) + threadIdx.x;
  bool found = false;
  for (int64_t tile = blockIdx.x; tile < t.units; tile += gridDim.x) {
    const int layer = t.find(tile);
    const int64_t numel = t.numel(layer);
    const int64_t at = (tile - t.first_unit(layer)) * (THREADS * C) + C * int64_t(threadIdx.x);
    if (at >= numel) continue;
    const int valid = numel - at < C ? int(numel - at) : C;
    const bool whole = C == 1 || (valid == C && t.aligned(layer));
    float v[C][N], result[C];
    read_rows<N, C>(t, layer, at, valid, whole, v);
#pragma unroll
    for (int k = 0; k < C; ++k) {
      float zero = 0.0f;  // x * 0 is 0 for finite x, else NaN
#pragma unroll
      for (int i = 0; i < N; ++i) zero = __fmaf_rn(v[k][i], 0.0f, zero);
      bool nan = false;
      if (!(zero == 0.0f)) {
        found = true;
#pragma unroll
        for (int i = 0; i < N; ++i) nan |= v[k][i] != v[k][i];
      }
      // -0 becomes +0: networks do not order the two
      result[k] = add(statistic_of<N, MEDIAN>(v[k], plan, column), 0.0f);
      if (nan) result[k] = __uint_as_float(0x7fc00000u);
    }
    write_out<C>(t, layer, at, valid, whole, result);
  }
  if (found && flags) atomicOr(flags, int(SELECT_NONFINITE));
}

// ---- any number of values in shared memory -----------------------------------------------------

template <class T>
struct Mix {
  const int64_t* starts;  // null: no mixing
  const int64_t* rows;
  const T* values;
};

// a[i] <- value i of the coordinate, mixed through b when there is a mixing matrix.
template <class T>
__device__ __forceinline__ void fill_column(const LargeRows& t, int layer, int64_t at, int count,
                                            const Mix<T>& mix, const Column<T>& a,
                                            const Column<T>& b) {
  const Column<T> to = mix.starts ? b : a;
  with_dtype<T>(t.dtype(layer), [&](auto d) {
    constexpr int D = decltype(d)::value;
#pragma unroll 8
    for (int i = 0; i < t.rows; ++i)
      to[i] = widen<D, T>(__ldcs(static_cast<const Stored<D>*>(t.row(layer, i)) + at));
  });
  if (!mix.starts) return;
  for (int i = 0; i < count; ++i) {
    const int64_t end = __ldg(mix.starts + i + 1);
    T sum = T(0);
#pragma unroll 4
    for (int64_t e = __ldg(mix.starts + i); e < end; ++e)
      sum = add(sum, mul(__ldg(mix.values + e), b[int(__ldg(mix.rows + e))]));
    a[i] = sum;
  }
}

// Shared memory: T [max(rows, values)][blockDim], twice when values are mixed or merged. A thread
// touches its own column only: no barrier.
template <class T>
__global__ void __launch_bounds__(COLUMN_THREADS)
    select_columns(const __grid_constant__ LargeRows t, const SelectPlan plan, const Mix<T> mix,
                   int32_t* flags) {
  const int stride = int(blockDim.x), rows = max(t.rows, plan.n);
  const Column<T> a{reinterpret_cast<T*>(shared_words) + threadIdx.x, stride};
  const Column<T> b{a.base + rows * stride, stride};
  bool found = false;
  for (int64_t tile = blockIdx.x; tile < t.units; tile += gridDim.x) {
    const int layer = t.find(tile);
    const int64_t at = (tile - t.first_unit(layer)) * stride + threadIdx.x;
    if (at >= t.numel(layer)) continue;
    fill_column(t, layer, at, plan.n, mix, a, b);
    bool nan = false;
    for (int i = 0; i < plan.n; ++i) {
      const T x = a[i];
      found |= !(sub(x, x) == T(0));
      nan |= x != x;
    }
    const Column<T> sorted = sort_column(a, b, plan.n);
    T result = add(statistic(sorted, plan), T(0));
    if (nan) result = T(__uint_as_float(0x7fc00000u));
    with_dtype<T>(t.dtype(layer), [&](auto d) {
      constexpr int D = decltype(d)::value;
      static_cast<Stored<D>*>(t.out(layer))[at] = narrow<D>(result);
    });
  }
  if (found && flags) atomicOr(flags, int(SELECT_NONFINITE));
}

// ---- launchers ---------------------------------------------------------------------------------

typedef void (*RegistersFn)(SmallRows, SelectPlan, int32_t*);

template <bool MEDIAN, int... I>
static RegistersFn registers_kernel(int64_t n, std::integer_sequence<int, I...>) {
  static constexpr RegistersFn KERNELS[] = {&select_registers<I + 1, MEDIAN>...};
  return KERNELS[n - 1];
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

static void launch_registers(const SelectArgs& a, const SelectPlan& plan, int32_t* flags,
                             int device, cudaStream_t stream) {
  const auto sizes = std::make_integer_sequence<int, MAX_WIRES>();
  const RegistersFn kernel = a.op == SELECT_MEDIAN ? registers_kernel<true>(a.n, sizes)
                                                   : registers_kernel<false>(a.n, sizes);
  const int64_t c = coordinates(int(a.n)), blocks = multiprocessors(device) * BLOCKS_PER_SM;
  const size_t shared = a.op >= SELECT_NEAR_MEDIAN ? size_t(a.n) * THREADS * sizeof(float) : 0;
  for_row_tables<SmallRows>(
      {a.n, a.layers, a.dtype, a.rows, a.out},
      [&](int64_t l) { return a.dtype[l] == F64 ? 0 : a.numel[l]; },
      [&](int64_t l) { return ceil_div(a.numel[l], THREADS * c); },
      [&](int64_t l) { return uint64_t(c * dtype_bytes(a.dtype[l])); },
      [&](const SmallRows& t) {
        start("select_registers", kernel, least_of(t.units, blocks), THREADS, shared, stream, t,
              plan, flags);
      });
}

// Threads of a block that give two or more blocks a multiprocessor, at least a warp while one fits.
static unsigned column_threads(size_t column, size_t limit) {
  unsigned threads = COLUMN_THREADS;
  while (threads > 8 && threads * column > (threads > 32 ? limit / 2 : limit)) threads /= 2;
  FLCORE_CHECK(threads * column <= limit, "select: the values of a block take ", threads * column,
               " bytes of shared memory and this device has ", limit);
  return threads;
}

// F64 layers when T is double, all others when it is float.
template <class T>
static void launch_columns(const SelectArgs& a, const SelectPlan& plan, const Mix<T>& mix,
                           int32_t* flags, int device, cudaStream_t stream) {
  const auto numel = [&](int64_t l) {
    return (a.dtype[l] == F64) == (sizeof(T) == 8) ? a.numel[l] : 0;
  };
  int64_t total = 0;
  for (int64_t l = 0; l < a.layers; ++l) total += numel(l);
  if (total == 0) return;
  const int64_t rows = a.n > a.count ? a.n : a.count;
  const int64_t buffers = mix.starts || a.count > RUN ? 2 : 1;
  const size_t column = size_t(buffers * rows) * sizeof(T);
  const unsigned threads = column_threads(column, shared_limit(device));
  const int64_t blocks = multiprocessors(device) * 2 * BLOCKS_PER_SM;
  for_row_tables<LargeRows>(
      {a.n, a.layers, a.dtype, a.rows, a.out}, numel,
      [&](int64_t l) { return ceil_div(a.numel[l], threads); },
      [&](int64_t) { return uint64_t(1); },
      [&](const LargeRows& t) {
        start("select_columns", &select_columns<T>, least_of(t.units, blocks), threads,
              threads * column, stream, t, plan, mix, flags);
      });
}

void launch_select(const SelectArgs& a, const float* mix_values, int32_t* flags, int device,
                   uintptr_t stream) {
  FLCORE_CHECK(a.n <= SELECT_MAX_ROWS && a.count <= SELECT_MAX_ROWS, "select: at most ",
               SELECT_MAX_ROWS, " client rows on a GPU, got ", a.n > a.count ? a.n : a.count);
  const DeviceGuard guard(device);
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  const SelectPlan plan{a.op, a.median, int(a.count), int(a.f), int(a.keep)};
  const Mix<double> wide{a.mix_starts, a.mix_rows, a.mix_values};
  const Mix<float> narrow{a.mix_starts, a.mix_rows, mix_values};
  if (!a.mix_starts && a.n <= MAX_WIRES)
    launch_registers(a, plan, flags, device, s);
  else
    launch_columns<float>(a, plan, narrow, flags, device, s);
  launch_columns<double>(a, plan, wide, flags, device, s);
}

}  // namespace cuda
}  // namespace flcore
