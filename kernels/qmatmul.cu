// y[m, n] = x W^T + bias + low up^T with W in codes of 4 or 8 bits (2 and 3 travel as 4), on tensor
// cores (QMatmulArgs in api.h):
//   fp16, bf16 x   W less its zero is exact in 16 bits; products of a group are summed in float32
//                  and take the group's scale in float32 then, so that W is never rounded. A
//                  floating zero is zero[n] times the sum of x over the group, formed once for x.
//   int8 x         codes times quantised activations (qmatmul_prepare.cu), integer sums of a block,
//                  then  y += (sx S) float(sum qx q - Z sum qx),  blocks in order.
// The weight is the first operand of mma m16n8k16 / m16n8k32, 16 outputs a time, and x the second,
// 8 rows a time: one to 16 rows cost the same reads. Codes lie so that 16 bytes a lane are its
// operands (qmatmul.cuh). A ring of up to 4 stages in shared memory is filled by asynchronous
// copies.
//
// Work: tiles of outputs by rows, each over all of K, are one list of steps that the blocks of
// threads share evenly, in stripes across tiles. A tile that several had a part in goes to a
// workspace in float32, and a second kernel adds the parts in order of k: no atomics, no locks, the
// same bits in every run on one kind of device.
//
// Bytes: codes and scales once for every 64 rows of x (from L2 but for the first time), x once for
// every 256 outputs. After "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large
// Language Models" (arXiv 2408.11743); the integer sums are R3 of quantized matmul.
#include <numeric>
#include <type_traits>

#include "qmatmul_sums.cuh"

namespace flcore {
namespace cuda {

namespace {

template <class T, int X = T::X>
struct ProductOf {
  typedef FloatProduct<T> type;
};
template <class T>
struct ProductOf<T, I8> {
  typedef IntProduct<T> type;
};

// ---- results ------------------------------------------------------------------------------------

// One value with bias and the product of low rank, in the dtype of y.
__device__ __forceinline__ void finish(const QMatmulParams& p, int64_t m, int64_t n, float v) {
  if (m >= p.m || n >= p.n) return;
  if (p.bias) v = __fadd_rn(v, p.bias[n]);
  if (p.rank) {
    float sum = 0.0f;
    for (int64_t r = 0; r < p.rank; ++r)
      sum = __fmaf_rn(p.low[m * p.rank + r], p.up[n * p.rank + r], sum);
    v = __fadd_rn(v, sum);
  }
  const int64_t at = m * p.y_stride + n;
  if (p.y_dtype == F32)
    static_cast<float*>(p.y)[at] = v;
  else if (p.y_dtype == F16)
    static_cast<uint16_t*>(p.y)[at] = narrow<F16>(v);
  else
    static_cast<uint16_t*>(p.y)[at] = narrow<BF16>(v);
}

// What a thread holds of 16 outputs and 8 rows, those from (n, m) on.
__device__ __forceinline__ void finish_four(const QMatmulParams& p, int64_t m, int64_t n,
                                            float4 v) {
  const int lane = int(threadIdx.x) % 32;
  m += 2 * (lane % 4), n += lane / 4;
  finish(p, m, n, v.x);
  finish(p, m + 1, n, v.y);
  finish(p, m, n + 8, v.z);
  finish(p, m + 1, n + 8, v.w);
}

// ---- kernels ------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(QM_THREADS, T::M > 2 ? 1 : 2)
    qmatmul_kernel(const __grid_constant__ QMatmulParams p) {
  typedef std::conditional_t<T::X == I8, int32_t, float> Sum;
  char* ring = reinterpret_cast<char*>(shared_words);
  uint2* table = nullptr;
  if (p.lookup) {
    table = reinterpret_cast<uint2*>(ring);
    ring += 256 * LOOKUP_COPIES * sizeof(uint2);
    for (int i = int(threadIdx.x); i < 256 * LOOKUP_COPIES; i += QM_THREADS)
      table[i] = p.lookup[i / LOOKUP_COPIES];
  }
  char* edges = ring;
  ring += EDGE_BYTES;
  const uint64_t policy = cache_policy(p.m_tiles == 1);
  const int64_t end = first_step(p, blockIdx.x + 1);
  for (int64_t now = first_step(p, blockIdx.x); now < end;) {
    const int64_t tile = now / p.k_tiles, begin = now - tile * p.k_tiles;
    const int64_t stop = begin + (end - now) < p.k_tiles ? begin + (end - now) : p.k_tiles;
    const int64_t m_tile = tile % p.m_tiles;
    const Stager<T> fill{p, tile / p.m_tiles * T::BLOCKS, m_tile * T::ROWS, policy};
    now += stop - begin;

    typename ProductOf<T>::type product;
    product.clear();
    __syncthreads();  // the ring is free, the table is there
    for (int s = 0; s + 1 < p.stages; ++s) {
      if (begin + s < stop) fill(ring + s * p.stage_bytes, begin + s);
      copy_commit();
    }
    Flushes next = {int((p.block - begin * T::K % p.block) / 16), true, edges};
    if (p.act_sum) sum_edges<T, Sum>(p, fill.m0, begin, stop, edges);
    int slot = 0;
    for (int64_t k = begin; k < stop; ++k) {
      wait_for_stage(p.stages);
      __syncthreads();  // of all threads; and the stage before is free
      const int free = slot == 0 ? p.stages - 1 : slot - 1;
      if (k + p.stages - 1 < stop) fill(ring + free * p.stage_bytes, k + p.stages - 1);
      copy_commit();
      const int64_t rest = (p.k - k * T::K + 15) / 16;
      product.stage(p, table, ring + slot * p.stage_bytes, rest < T::K / 16 ? int(rest) : T::K / 16,
                    k + 1 == stop, next);
      slot = slot + 1 == p.stages ? 0 : slot + 1;
    }

    const int thread = int(threadIdx.x), warp = thread / 32;
    if (begin > 0 || stop < p.k_tiles) {
      float4* out = p.partial + partial_slot(p, blockIdx.x, tile) * (T::N * T::M * QM_THREADS);
#pragma unroll
      for (int n = 0; n < T::N; ++n)
#pragma unroll
        for (int m = 0; m < T::M; ++m) {
          const float(&v)[4] = product.total[n][m];
          if (fill.m0 + 8 * m < p.m)
            out[(n * T::M + m) * QM_THREADS + thread] = float4{v[0], v[1], v[2], v[3]};
        }
      continue;
    }
    // through shared memory, so that the code that writes is there once and not for every register
    __syncthreads();
    float4* held = reinterpret_cast<float4*>(ring) + thread;
#pragma unroll
    for (int n = 0; n < T::N; ++n)
#pragma unroll
      for (int m = 0; m < T::M; ++m) {
        const float(&v)[4] = product.total[n][m];
        held[(n * T::M + m) * QM_THREADS] = float4{v[0], v[1], v[2], v[3]};
      }
#pragma unroll 1
    for (int i = 0; i < T::N * T::M; ++i)
      finish_four(p, fill.m0 + 8 * (i % T::M), (fill.n0 + warp * T::N + i / T::M) * 16,
                  held[i * QM_THREADS]);
  }
}

// Tiles that more than one block had a part in: 8 rows of a tile a block, parts in order of k.
__global__ void __launch_bounds__(QM_THREADS)
    qmatmul_join_kernel(const __grid_constant__ QMatmulParams p, int m_of_warp, int n_of_warp) {
  const int each = m_of_warp * n_of_warp, i = int(blockIdx.x % unsigned(each));
  const int64_t second = 1 + blockIdx.x / unsigned(each);  // first block that goes on with a tile
  const int64_t tile = first_step(p, second) / p.k_tiles, begin = tile * p.k_tiles;
  if (first_step(p, second) == begin || first_step(p, second - 1) > begin) return;
  const int64_t m0 = (tile % p.m_tiles * m_of_warp + i % m_of_warp) * 8;
  if (m0 >= p.m) return;
  const int thread = int(threadIdx.x), warp = thread / 32;
  const auto part = [&](int64_t block) {
    return p.partial[(partial_slot(p, block, tile) * each + i) * QM_THREADS + thread];
  };
  float4 sum = part(second - 1);
  const int64_t end = begin + p.k_tiles;
  for (int64_t block = second; block < p.grid && first_step(p, block) < end; ++block) {
    const float4 next = part(block);
    sum.x = __fadd_rn(sum.x, next.x);
    sum.y = __fadd_rn(sum.y, next.y);
    sum.z = __fadd_rn(sum.z, next.z);
    sum.w = __fadd_rn(sum.w, next.w);
  }
  const int64_t n_block = tile / p.m_tiles * (n_of_warp * QM_WARPS) + warp * n_of_warp;
  finish_four(p, m0, (n_block + i / m_of_warp) * 16, sum);
}

// ---- launchers ----------------------------------------------------------------------------------

constexpr int64_t SMALL_ROWS = 16;

template <int X, int B>
using SmallTile = Tile<X, B, 2, 1, 128>;
template <int X, int B>
using LargeTile = Tile<X, B, 8, 2, 64>;

// Calls f(tile) for the tile of these arguments.
template <class F>
void for_tile(const QMatmulArgs& a, bool int8, const F& f) {
  const bool wide = a.w.bits == 8, small = a.m <= SMALL_ROWS;
  const auto sized = [&](auto x, auto b) {
    constexpr int X = decltype(x)::value, B = decltype(b)::value;
    if (small)
      f(SmallTile<X, B>());
    else
      f(LargeTile<X, B>());
  };
  const auto coded = [&](auto x) {
    if (wide)
      sized(x, Constant<8>());
    else
      sized(x, Constant<4>());
  };
  if (int8)
    coded(Constant<I8>());
  else if (a.x_dtype == F16)
    coded(Constant<F16>());
  else
    coded(Constant<BF16>());
}

int64_t up_to(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <class T>
size_t shared_bytes(const QMatmulParams& p, int stages) {
  const size_t ring = size_t(stages) * size_t(p.stage_bytes), held = T::N * T::M * QM_THREADS * 16;
  const size_t table = p.lookup ? 256 * LOOKUP_COPIES * sizeof(uint2) : 0;
  return EDGE_BYTES + (ring > held ? ring : held) + table;
}

// Everything but the addresses.
template <class T>
QMatmulParams plan_tile(const QMatmulArgs& a, const QMatmulDevice& d, int device) {
  QMatmulParams p = {};
  const QMatmulBlocks cut = qmatmul_blocks(a, T::X == I8);
  p.m = a.m, p.n = a.w.n, p.k = a.w.k;
  p.pieces = up_to(a.w.k, 64) / T::PIECE_K;
  p.groups = (a.w.k + a.w.group - 1) / a.w.group;
  p.scale_dtype = a.w.scale_dtype;
  p.scale_bytes = int(dtype_bytes(a.w.scale_dtype));
  p.zero_bytes = !a.w.zeros ? 0 : a.w.kind == QW_FLOAT_ZERO ? p.scale_bytes : 1;
  p.middle = 1 << (a.w.bits - 1);
  p.lookup = static_cast<const uint2*>(d.lookup);
  p.terms = d.terms;
  p.unit = d.unit;
  p.block = cut.length, p.blocks = cut.count;
  p.scale_every = cut.of_scale, p.act_every = cut.of_act;
  p.piece = int(std::gcd(cut.length, int64_t(T::K)));
  p.m_pad = up_to(a.m, 64);
  const int64_t most = T::K % cut.length == 0   ? T::K / cut.length  // flushes of a stage
                       : cut.length % T::K == 0 ? 1
                                                : (T::K - 1) / cut.length + 2;
  p.zero_at = T::OUTPUTS * p.scale_bytes;
  p.act_at = p.zero_at + T::OUTPUTS * p.zero_bytes;
  p.sum_at = p.act_at + (T::X == I8 ? T::ROWS * 4 : 0);
  p.shift_at = p.sum_at + (T::X == I8 || p.zero_bytes > 1 ? T::ROWS * 4 : 0);
  p.extra_bytes = p.shift_at + (T::X == I8 && a.asymmetric ? T::ROWS * 4 : 0);
  p.stage_bytes = T::EXTRA_AT + int(most) * p.extra_bytes;
  p.n_tiles = (a.w.n + T::OUTPUTS - 1) / T::OUTPUTS;
  p.m_tiles = (a.m + T::ROWS - 1) / T::ROWS;
  p.k_tiles = (a.w.k + T::K - 1) / T::K;

  const DeviceGuard guard(device);
  const size_t limit = shared_limit(device);
  int resident = T::M > 2 ? 1 : 2;
  p.stages = 4;
  while (p.stages > 2 && size_t(resident) * (shared_bytes<T>(p, p.stages) + 1024) > limit + 1024) {
    if (--p.stages == 2 && resident == 2) p.stages = 4, resident = 1;
  }
  const int64_t steps = p.n_tiles * p.m_tiles * p.k_tiles;
  const int64_t blocks = int64_t(multiprocessors(device)) * resident;
  p.grid = steps < blocks ? steps : blocks;
  return p;
}

// Bytes of the workspace: parts of tiles, then what is made of x.
struct Workspace {
  int64_t x, scale, sum, pieces, zero, bytes;  // where each begins

  template <class T>
  Workspace(const QMatmulParams& p, const QMatmulBlocks& cut, bool asymmetric, T) {
    constexpr bool quantised = T::X == I8;
    const int64_t slot = T::N * T::M * QM_THREADS * int64_t(sizeof(float4));
    x = p.grid > 1 ? 2 * p.grid * slot : 0;
    scale = up_to(x + (quantised ? p.m * up_to(p.k, 64) : 0), 256);
    sum = up_to(scale + (quantised ? cut.acts * p.m_pad * 4 : 0), 256);
    const int64_t row = quantised || p.zero_bytes > 1 ? p.m_pad * 4 : 0;
    pieces = up_to(sum + cut.count * row, 256);
    zero = up_to(pieces + up_to(p.k, p.piece) / p.piece * row, 256);
    bytes = up_to(zero + (quantised && asymmetric ? cut.acts * p.m_pad * 4 : 0), 256);
  }
};

template <class T>
void run_tile(const QMatmulArgs& a, const QMatmulDevice& d, int device, cudaStream_t stream) {
  QMatmulParams p = plan_tile<T>(a, d, device);
  const QMatmulBlocks cut = qmatmul_blocks(a, T::X == I8);
  const Workspace at(p, cut, a.asymmetric, T());
  char* work = static_cast<char*>(d.workspace);
  p.codes = a.w.codes;
  p.scales = static_cast<const uint8_t*>(a.w.scales);
  p.zeros = static_cast<const uint8_t*>(a.w.zeros);
  p.x = static_cast<const uint8_t*>(a.x);
  p.x_stride = a.x_stride * T::ITEM;
  p.width = a.w.k;
  p.partial = reinterpret_cast<float4*>(work);
  p.y = a.y;
  p.y_stride = a.y_stride;
  p.y_dtype = a.y_dtype;
  p.bias = a.bias, p.low = a.low, p.up = a.up, p.rank = a.rank;

  const DeviceGuard guard(device);
  QActArgs act = {};
  act.x = a.x, act.x_dtype = a.x_dtype, act.x_stride = a.x_stride;
  act.m = a.m, act.k = a.w.k, act.m_pad = p.m_pad;
  act.block = cut.length, act.piece = p.piece;
  act.sums = work + at.sum, act.piece_sums = work + at.pieces;
  if (T::X == I8) {
    act.act_block = cut.act;
    act.swap = T::B == 4;
    act.asymmetric = a.asymmetric;
    act.codes = reinterpret_cast<int8_t*>(work + at.x);
    act.scales = reinterpret_cast<float*>(work + at.scale);
    act.zeros = reinterpret_cast<int32_t*>(work + at.zero);
    launch_qmatmul_activations(act, stream);
    p.x = reinterpret_cast<const uint8_t*>(act.codes);
    p.x_stride = p.width = up_to(a.w.k, 64);
    p.act_scale = act.scales;
    p.act_zero = a.asymmetric ? act.zeros : nullptr;
  } else if (p.zero_bytes > 1) {
    launch_qmatmul_row_sums(act, stream);
  }
  if (T::X == I8 || p.zero_bytes > 1) p.act_sum = act.sums, p.act_pieces = act.piece_sums;
  start("qmatmul", &qmatmul_kernel<T>, p.grid, QM_THREADS, shared_bytes<T>(p, p.stages), stream, p);
  const bool shared_tiles = p.grid > 1 && (p.n_tiles * p.m_tiles % p.grid != 0);
  if (shared_tiles)
    start("qmatmul join", &qmatmul_join_kernel, (p.grid - 1) * T::M * T::N, QM_THREADS, 0, stream,
          p, T::M, T::N);
}

}  // namespace

int64_t qmatmul_workspace(const QMatmulArgs& args, const QMatmulDevice& d, bool int8, int device) {
  int64_t bytes = 0;
  for_tile(args, int8, [&](auto tile) {
    typedef decltype(tile) T;
    const QMatmulParams p = plan_tile<T>(args, d, device);
    bytes = Workspace(p, qmatmul_blocks(args, int8), args.asymmetric, tile).bytes;
  });
  return bytes;
}

void launch_qmatmul(const QMatmulArgs& args, const QMatmulDevice& d, bool int8, int device,
                    uintptr_t stream) {
  for_tile(args, int8, [&](auto tile) {
    run_tile<decltype(tile)>(args, d, device, reinterpret_cast<cudaStream_t>(stream));
  });
}

}  // namespace cuda
}  // namespace flcore
