// Weighted sum of n client rows on the GPU, each row a list of layers (CombineArgs in api.h):
//   acc[j] = start[j] + w_0 x_0[j] + w_1 x_1[j] + ...      in client order, multiply then add
// Reads every value once and writes one row: n*s + s bytes a coordinate (s = bytes of the dtype);
// streaming into a state: s*n + 8 (float32 state). Sums stay in registers; a thread has eight rows'
// 16-byte loads in flight before the first is used, so that latency is covered at low occupancy.
//
// Exactness: the operations of csrc/cpu/combine.isa.cpp in the same order, each rounded by itself
// (__fmul_rn, __fadd_rn: never contracted), so the bits are those of the CPU kernel; a coordinate
// belongs to one thread, so neither grid nor alignment changes them. The reproducible bins are
// explained there. Payloads of NaNs are not promised.
//
// Pointers and weights travel by value in the launch's constant bank (as in torch's multi-tensor
// kernels): no allocation, no copy to wait for, and a captured graph replays with its own table.
#include "combine_table.cuh"
#include "launch.h"

namespace flcore {
namespace cuda {

constexpr int BLOCKS_PER_SM = 8;

// ---- accumulators of one coordinate ------------------------------------------------------------

template <class Acc>
struct Plain {
  typedef Acc Real;
  static constexpr int PARTS = 1;
  Acc part[1];

  // -0 + p is p for every p, a zero of either sign included: a sum that starts from its first term
  __device__ void start(bool empty) { part[0] = empty ? Acc(0) : Acc(-0.0); }
  __device__ int add(float w, float x) {
    part[0] = __fadd_rn(part[0], __fmul_rn(w, x));
    return 0;
  }
  __device__ int add(double w, double x) {
    part[0] = __dadd_rn(part[0], __dmul_rn(w, x));
    return 0;
  }
  __device__ Acc total() const { return part[0]; }
};

struct Bins {  // multiples of BIN_UNIT[b], b = 0, 1, 2
  typedef double Real;
  static constexpr int PARTS = 3;
  double part[3];

  __device__ void start(bool) { part[0] = part[1] = part[2] = 0.0; }
  __device__ int add(double w, double x) {
    constexpr double CUT[3] = {1.5 * 0x1p52 * BIN_UNIT[0], 1.5 * 0x1p52 * BIN_UNIT[1],
                               1.5 * 0x1p52 * BIN_UNIT[2]};
    const double p = __dmul_rn(w, x);
    double rest = p;
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      const double q = __dsub_rn(__dadd_rn(rest, CUT[b]), CUT[b]);
      part[b] = __dadd_rn(part[b], q);
      rest = __dsub_rn(rest, q);
    }
    return p < BIN_LIMIT && p > -BIN_LIMIT ? 0 : COMBINE_OUT_OF_RANGE;  // true for NaN too
  }
  __device__ double total() const { return __dadd_rn(__dadd_rn(part[0], part[1]), part[2]); }
};

__device__ __forceinline__ float divided(float x, double divisor) {  // one rounding to float32
  return divisor == 1.0 ? x : __double2float_rn(__ddiv_rn(double(x), divisor));
}
__device__ __forceinline__ double divided(double x, double divisor) {
  return divisor == 1.0 ? x : __ddiv_rn(x, divisor);
}

// ---- kernels -----------------------------------------------------------------------------------

// N neighbouring coordinates of one layer, from element `at` on; returns CombineFlags.
template <int D, class Sum, int N, class Table>
__device__ __forceinline__ int sum_rows(const Table& t, int layer, int64_t at) {
  typedef typename Sum::Real Real;
  constexpr int ROWS = N * Sum::PARTS > 16 ? 4 : 8;  // loads in flight, as registers allow
  Sum sum[N];
  Real* state = static_cast<Real*>(t.state(layer));
  const int64_t numel = t.numel(layer);
#pragma unroll
  for (int k = 0; k < N; ++k) sum[k].start(t.rows == 0);
  if (state) {
#pragma unroll
    for (int b = 0; b < Sum::PARTS; ++b) {
      Real part[N];
      load_once(part, state + b * numel + at);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k].part[b] = part[k];
    }
  }
  int flags = 0;
  for (int i = 0; i < t.rows; i += ROWS) {
    Stored<D> x[ROWS][N];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (i + r < t.rows)
        load_once(x[r], static_cast<const Stored<D>*>(t.row(layer, i + r)) + at);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (i + r >= t.rows) break;
      const Real w = t.template weight<Real>(i + r);
#pragma unroll
      for (int k = 0; k < N; ++k) flags |= sum[k].add(w, widen<D, Real>(x[r][k]));
    }
  }
  void* out = t.out(layer);
  Stored<D> result[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Real total = sum[k].total();
    if (!(total - total == Real(0))) flags |= COMBINE_NONFINITE;  // NaN for NaN and infinity
    result[k] = narrow<D>(divided(total, t.divisor));
  }
  if (out) {
    store(static_cast<Stored<D>*>(out) + at, result);
    return flags;
  }
#pragma unroll
  for (int b = 0; b < Sum::PARTS; ++b) {
    Real part[N];
#pragma unroll
    for (int k = 0; k < N; ++k) part[k] = sum[k].part[b];
    store(state + b * numel + at, part);
  }
  return flags;
}

// Two or three blocks a multiprocessor: 16 KiB and more of loads in flight, and no spilled register.
template <int D, class Sum, class Table>
__global__ void __launch_bounds__(THREADS, D == F32 && sizeof(Sum) == 4 ? 3 : 2)
    combine_kernel(const __grid_constant__ Table t, int32_t* flags) {
  constexpr int VALUES = 16 / sizeof(Stored<D>);
  int found = 0;
  for (int64_t tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
    const int layer = t.find(tile);
    const int64_t begin = (tile - t.first_tile(layer)) * (THREADS * VALUES);
    const int64_t end = min(begin + THREADS * VALUES, t.numel(layer));
    if (t.aligned(layer) && end - begin == THREADS * VALUES) {
      found |= sum_rows<D, Sum, VALUES>(t, layer, begin + VALUES * threadIdx.x);
    } else {
      for (int64_t at = begin + threadIdx.x; at < end; at += THREADS)
        found |= sum_rows<D, Sum, 1>(t, layer, at);
    }
  }
  if (found && flags) atomicOr(flags, found);
}

// flags[row0 + i] = 1 when row i holds a NaN or an infinity: all exponent bits set
template <int D, class Table>
__global__ void __launch_bounds__(THREADS)
    nonfinite_kernel(const __grid_constant__ Table t, int32_t* flags) {
  constexpr int VALUES = 16 / sizeof(Stored<D>);
  for (int64_t tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
    const int layer = t.find(tile);
    const int64_t begin = (tile - t.first_tile(layer)) * (THREADS * VALUES);
    const int64_t end = min(begin + THREADS * VALUES, t.numel(layer));
    for (int i = 0; i < t.rows; ++i) {
      const Stored<D>* x = static_cast<const Stored<D>*>(t.row(layer, i));
      bool bad = false;
#pragma unroll 4
      for (int64_t at = begin + threadIdx.x; at < end; at += THREADS)
        bad |= !isfinite(widen<D, double>(__ldcs(x + at)));
      if (bad) atomicOr(flags + i, 1);
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------

static unsigned grid_for(int64_t tiles, int device) {
  const int64_t resident = int64_t(multiprocessors(device)) * BLOCKS_PER_SM;
  return unsigned(tiles < resident ? tiles : resident);
}

template <int D, class Sum>
static void launch_sums(const CombineArgs& a, int32_t* flags, int device, cudaStream_t stream) {
  for_tables<D, typename Sum::Real>(a, Sum::PARTS, [&](const auto& table) {
    combine_kernel<D, Sum><<<grid_for(table.tiles, device), THREADS, 0, stream>>>(table, flags);
    check_launch("combine_kernel");
  });
}

template <int D>
static void launch_dtype(const CombineArgs& a, int32_t* flags, int device, cudaStream_t stream) {
  if (a.accumulate == ACC_REPRODUCIBLE)
    launch_sums<D, Bins>(a, flags, device, stream);
  else if (D == F64 || a.accumulate == ACC_F64)
    launch_sums<D, Plain<double>>(a, flags, device, stream);
  else if constexpr (D != F64)
    launch_sums<D, Plain<float>>(a, flags, device, stream);
}

void launch_combine(const CombineArgs& a, int32_t* flags, int device, uintptr_t stream) {
  FLCORE_CHECK(a.n <= COMBINE_MAX_ROWS, "combine: at most ", COMBINE_MAX_ROWS,
               " client rows a launch, got ", a.n);
  const DeviceGuard guard(device);
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  launch_dtype<F64>(a, flags, device, s);
  launch_dtype<F32>(a, flags, device, s);
  launch_dtype<F16>(a, flags, device, s);
  launch_dtype<BF16>(a, flags, device, s);
}

template <int D>
static void launch_scan(const CombineArgs& rows, int32_t* flags, int device, cudaStream_t stream) {
  for_tables<D, double>(rows, 1, [&](const auto& table) {
    nonfinite_kernel<D><<<grid_for(table.tiles, device), THREADS, 0, stream>>>(table, flags);
    check_launch("nonfinite_kernel");
  });
}

void launch_nonfinite(const FiniteArgs& a, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  for (int64_t first = 0; first < a.n; first += COMBINE_MAX_ROWS) {
    CombineArgs rows = {};
    rows.n = a.n - first < COMBINE_MAX_ROWS ? a.n - first : COMBINE_MAX_ROWS;
    rows.layers = a.layers;
    rows.numel = a.numel;
    rows.dtype = a.dtype;
    rows.rows = a.rows + first * a.layers;
    launch_scan<F64>(rows, a.flags + first, device, s);
    launch_scan<F32>(rows, a.flags + first, device, s);
    launch_scan<F16>(rows, a.flags + first, device, s);
    launch_scan<BF16>(rows, a.flags + first, device, s);
  }
}

}  // namespace cuda
}  // namespace flcore
