// What the products of qmatmul.cu read beside their weights, and the order of the codes:
//   repack       tile16 (QWeight in api.h) to fragment order (qmatmul.cuh), once for a weight
//   activations  x to int8, one scale for `act_block` values of a row, by the formulas of
//                csrc/cpu/act_quant.h, operation by operation: the same codes, scales; their sums
//   row sums     sums of x over the blocks of a floating zero, in a fixed order
// x is read twice and written once in a quarter or half of its bytes; sums are small.
#include "qmatmul.cuh"

namespace flcore {
namespace cuda {

namespace {

// ---- fragment order -----------------------------------------------------------------------------

// The code of output 16 block + row and position k, in the layout tile16; 0 beyond its padding.
__device__ uint32_t tile16_code(const QWeight& w, int64_t chunks, int64_t block, int row,
                                int64_t k) {
  if (k >= chunks * 32) return 0;
  const uint8_t* chunk = w.codes + (block * chunks + k / 32) * 64 * w.bits;
  const int at = int(k % 32), byte = row * 4 + at % 4;
  if (w.bits == 8) return chunk[at / 4 * 64 + byte];
  if (w.bits == 4) return uint32_t(chunk[at / 8 * 64 + byte]) >> (at & 4) & 15u;
  const int t = at / 4;  // of a plane with one bit a code
  const uint32_t low = uint32_t(chunk[at / 16 * 64 + byte]) >> (2 * (t % 4)) & 3u;
  return w.bits == 2 ? low : low | (uint32_t(chunk[128 + byte]) >> t & 1u) << 2;
}

__global__ void __launch_bounds__(QM_THREADS)
    qmatmul_repack_kernel(QWeight w, int64_t chunks, int64_t pieces, uint32_t* out, int64_t words) {
  const int64_t i = int64_t(blockIdx.x) * QM_THREADS + threadIdx.x;
  if (i >= words) return;
  const int word = int(i % 4), lane = int(i / 4 % 32), g = lane / 4, t = lane % 4;
  const int64_t piece = i / 128 % pieces, block = i / 128 / pieces;
  uint32_t value = 0;
  if (w.bits == 8) {
    const int64_t k = piece * 32 + 16 * (word / 2) + 4 * t;
    for (int b = 0; b < 4; ++b)
      value |= tile16_code(w, chunks, block, g + 8 * (word % 2), k + b) << (8 * b);
  } else {
    const int64_t k = piece * 64 + 16 * word + 4 * t;
    for (int p = 0; p < 8; ++p) {
      const int64_t at = k + p / 4 + 2 * (p / 2 % 2);
      value |= tile16_code(w, chunks, block, g + 8 * (p % 2), at) << (4 * p);
    }
  }
  out[i] = value;
}

// ---- reductions over a warp, or over all warps of a block of threads ----------------------------

struct Team {
  int warps, warp, lane;  // warps that work together: 1 or QM_WARPS

  template <class F>
  __device__ uint32_t reduce(uint32_t x, uint32_t* shared, const F& f) const {
    for (int apart = 16; apart > 0; apart /= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, apart));
    if (warps == 1) return x;
    __syncthreads();  // the last use of `shared` is over
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = shared[0];
    for (int i = 1; i < QM_WARPS; ++i) x = f(x, shared[i]);
    return x;
  }
};

__device__ __forceinline__ uint32_t larger_bits(uint32_t a, uint32_t b) { return a > b ? a : b; }
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  return __uint_as_float(a) > __uint_as_float(b) ? a : b;
}
__device__ __forceinline__ uint32_t add_ints(uint32_t a, uint32_t b) { return a + b; }
__device__ __forceinline__ uint32_t add_floats(uint32_t a, uint32_t b) {
  return __float_as_uint(__fadd_rn(__uint_as_float(a), __uint_as_float(b)));
}

__device__ __forceinline__ float read_x(const QActArgs& a, int64_t row, int64_t k) {
  const int64_t i = row * a.x_stride + k;
  switch (a.x_dtype) {
    case F32: return static_cast<const float*>(a.x)[i];
    case F16: return widen<F16, float>(static_cast<const uint16_t*>(a.x)[i]);
    default: return widen<BF16, float>(static_cast<const uint16_t*>(a.x)[i]);
  }
}

// ---- activations --------------------------------------------------------------------------------

struct Scale {
  float scale, shift, inverse;  // q = rne((x shift) inverse) + zero
  int zero;
};

__device__ __forceinline__ int clip_byte(int q) { return q < -128 ? -128 : q > 127 ? 127 : q; }

__device__ Scale scale_of(uint32_t top, float low, float high, bool asymmetric) {
  if (top >= 0x7f800000u) return {__uint_as_float(0x7fc00000u), 0.0f, 0.0f, 0};
  if (top == 0) return {0.0f, 0.0f, 0.0f, 0};
  const float absmax = __uint_as_float(top);
  const bool tiny = absmax < 0x1p-64f;
  const float shift = tiny ? 0x1p64f : 1.0f, back = tiny ? 0x1p-64f : 1.0f;
  if (!asymmetric) {
    const float a = __fmul_rn(absmax, shift);
    return {__fmul_rn(__fdiv_rn(a, 127.0f), back), shift, __fdiv_rn(127.0f, a), 0};
  }
  const float range = __fsub_rn(__fmul_rn(__fmul_rn(high, shift), 0.5f),
                                __fmul_rn(__fmul_rn(low, shift), 0.5f));
  const float inverse = __fdiv_rn(127.5f, range);
  const int zero = clip_byte(__float2int_rn(__fmul_rn(-__fmul_rn(low, shift), inverse)) - 128);
  return {__fmul_rn(__fdiv_rn(range, 127.5f), back), shift, inverse, zero};
}

// Codes of the positions [from, from + piece) of a row; returns the sum of (code - zero).
__device__ int code_piece(const QActArgs& a, const Scale& s, int64_t row, int64_t from, int lane) {
  const int64_t width = (a.k + 63) / 64 * 64;
  int sum = 0;
  for (int64_t k = from + lane; k < from + a.piece && k < width; k += 32) {
    int q = s.zero;
    if (k < a.k && s.inverse != 0.0f) {
      const float x = __fmul_rn(__fmul_rn(read_x(a, row, k), s.shift), s.inverse);
      q = clip_byte(__float2int_rn(x) + s.zero);
      sum += q - s.zero;
    }
    // codes of 4 bits come out of a word in the order k, k + 2, k + 1, k + 3
    const int64_t at = a.swap ? (k & ~int64_t(3)) | (k & 1) << 1 | (k >> 1 & 1) : k;
    a.codes[row * width + at] = int8_t(q);
  }
  for (int apart = 16; apart > 0; apart /= 2)
    sum += int(__shfl_xor_sync(0xffffffffu, unsigned(sum), apart));
  return sum;
}

__global__ void __launch_bounds__(QM_THREADS)
    qmatmul_activations_kernel(const __grid_constant__ QActArgs a, int warps) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_words);
  const Team team = {warps, int(threadIdx.x) / 32, int(threadIdx.x) % 32};
  const int64_t acts = (a.k + a.act_block - 1) / a.act_block;
  const int64_t unit = (int64_t(blockIdx.x) * QM_WARPS + team.warp) / warps;
  if (unit >= acts * a.m) return;  // a warp, or the whole block of threads
  const int64_t row = unit / acts, act = unit % acts, first = act * a.act_block;
  const int64_t next = first + a.act_block, last = next < a.k ? next : a.k;

  uint32_t top = 0, low = 0, high = 0;  // low: of -x, so that both are the larger of two
  const int each = warps * 32, mine = warps == 1 ? team.lane : int(threadIdx.x);
  for (int64_t k = first + mine; k < last; k += each) {
    const float x = read_x(a, row, k);
    top = larger_bits(top, __float_as_uint(x) & 0x7fffffffu);
    high = larger(__float_as_uint(x), high);
    low = larger(__float_as_uint(-x), low);
  }
  top = team.reduce(top, shared, larger_bits);
  if (a.asymmetric) {
    low = team.reduce(low, shared, larger);
    high = team.reduce(high, shared, larger);
  }
  const Scale s = scale_of(top, -__uint_as_float(low), __uint_as_float(high), a.asymmetric);
  if (mine == 0) {
    a.scales[act * a.m_pad + row] = s.scale;
    if (a.asymmetric) a.zeros[act * a.m_pad + row] = s.zero;
  }

  int32_t* sums = static_cast<int32_t*>(a.sums);
  int32_t* pieces = static_cast<int32_t*>(a.piece_sums);
  const int64_t end = last < a.k ? last : (a.k + 63) / 64 * 64;  // with the padding
  const bool together = a.block == a.act_block;  // all warps at one block, else one block a warp
  const int64_t step = together ? end - first : a.block;
  const int helper = warps == 1 ? 0 : team.warp;
  for (int64_t block = first + (together ? 0 : helper * step); block < end;
       block += step * (together ? 1 : warps)) {
    int sum = 0;
    for (int64_t k = block + (together ? helper * a.piece : 0); k < block + step && k < end;
         k += a.piece * (together ? warps : 1)) {
      const int found = code_piece(a, s, row, k, team.lane);
      if (team.lane == 0 && k < a.k) pieces[k / a.piece * a.m_pad + row] = found;
      sum += found;
    }
    if (together) {
      if (team.lane > 0) sum = 0;  // the sum of a warp is known to all its lanes
      sum = int(team.reduce(uint32_t(sum), shared, add_ints));
    }
    if (team.lane == 0 && block < a.k && (!together || helper == 0))
      sums[block / a.block * a.m_pad + row] = sum;
  }
}

// ---- row sums -----------------------------------------------------------------------------------

__global__ void __launch_bounds__(QM_THREADS)
    qmatmul_row_sums_kernel(const __grid_constant__ QActArgs a, int warps) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_words);
  const Team team = {warps, int(threadIdx.x) / 32, int(threadIdx.x) % 32};
  const int64_t blocks = (a.k + a.block - 1) / a.block;
  const int64_t unit = (int64_t(blockIdx.x) * QM_WARPS + team.warp) / warps;
  if (unit >= blocks * a.m) return;
  const int64_t row = unit / blocks, block = unit % blocks, first = block * a.block;
  const int64_t last = first + a.block < a.k ? first + a.block : a.k;
  const int helper = warps == 1 ? 0 : team.warp;
  float total = 0.0f;
  for (int64_t from = first + helper * a.piece; from < last; from += a.piece * warps) {
    float sum = 0.0f;
    for (int64_t k = from + team.lane; k < from + a.piece && k < last; k += 32)
      sum = __fadd_rn(sum, read_x(a, row, k));
    for (int apart = 16; apart > 0; apart /= 2)
      sum = __fadd_rn(sum, __uint_as_float(
                               __shfl_xor_sync(0xffffffffu, __float_as_uint(sum), apart)));
    if (team.lane == 0)
      static_cast<float*>(a.piece_sums)[from / a.piece * a.m_pad + row] = sum;
    total = __fadd_rn(total, sum);
  }
  if (team.lane > 0) total = 0.0f;
  total = __uint_as_float(team.reduce(__float_as_uint(total), shared, add_floats));
  if (team.lane == 0 && helper == 0) static_cast<float*>(a.sums)[block * a.m_pad + row] = total;
}

constexpr int64_t LONG = 512;  // positions above which all warps of a block of threads share them

void start_units(const char* name, void (*kernel)(QActArgs, int), int64_t units, int64_t length,
                 const QActArgs& a, cudaStream_t stream) {
  const int warps = length > LONG ? QM_WARPS : 1;
  start(name, kernel, (units * warps + QM_WARPS - 1) / QM_WARPS, QM_THREADS, 64, stream, a, warps);
}

constexpr int64_t LONGEST = 1 << 15;  // 255 * 255 * LONGEST is an int32

int64_t at_least_one(int64_t x) { return x < 1 ? 1 : x; }

}  // namespace

QMatmulBlocks qmatmul_blocks(const QMatmulArgs& args, bool int8) {
  const int64_t k = args.w.k, whole = at_least_one((k + 127) / 128) * 128;
  const int64_t group = args.w.group < k ? args.w.group : whole;
  const int64_t act = int8 && args.act_block > 0 && args.act_block < k ? args.act_block : whole;
  QMatmulBlocks b = {};
  b.act = act;
  b.length = int8 && act < group ? act : group;
  FLCORE_CHECK(!int8 || act == whole || group == whole || act % group == 0 || group % act == 0,
               "act_block: expected a divisor or a multiple of the group of ", group, ", got ",
               act);
  if (int8) {
    const int64_t units = b.length / 16;
    int64_t parts = 1;
    while (b.length / parts > LONGEST || units % parts) ++parts;
    b.length /= parts;
  }
  b.count = at_least_one((k + b.length - 1) / b.length);
  b.acts = at_least_one((k + act - 1) / act);
  const auto lasts = [&](int64_t positions) {
    return int(positions == whole ? b.count : positions / b.length);
  };
  b.of_scale = lasts(group);
  b.of_act = lasts(act);
  return b;
}

int64_t qmatmul_fragment_bytes(const QWeight& w) {
  return (w.n + 15) / 16 * ((w.k + 63) / 64) * (w.bits == 8 ? 2 : 1) * PIECE;
}

void launch_qmatmul_repack(const QWeight& w, uint8_t* fragments, int device, uintptr_t stream) {
  const int64_t words = qmatmul_fragment_bytes(w) / 4;
  if (words == 0) return;
  const int64_t pieces = (w.k + 63) / 64 * (w.bits == 8 ? 2 : 1);
  const DeviceGuard guard(device);
  start("qmatmul repack", &qmatmul_repack_kernel, (words + QM_THREADS - 1) / QM_THREADS, QM_THREADS,
        0, reinterpret_cast<cudaStream_t>(stream), w, (w.k + 31) / 32, pieces,
        reinterpret_cast<uint32_t*>(fragments), words);
}

void launch_qmatmul_activations(const QActArgs& a, cudaStream_t stream) {
  const int64_t length = a.act_block < a.k ? a.act_block : a.k;
  start_units("qmatmul activations", &qmatmul_activations_kernel,
              a.m * ((a.k + a.act_block - 1) / a.act_block), length, a, stream);
}

void launch_qmatmul_row_sums(const QActArgs& a, cudaStream_t stream) {
  const int64_t length = a.block < a.k ? a.block : a.k;
  start_units("qmatmul row sums", &qmatmul_row_sums_kernel,
              a.m * ((a.k + a.block - 1) / a.block), length, a, stream);
}

}  // namespace cuda
}  // namespace flcore
