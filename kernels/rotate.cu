// Rotated codes with feedback on the GPU (QuantizeArgs in api.h): update and state in, codes and
// new state out, in one pass over memory. One block of threads a block of coordinates:
//   s, t, u        the affine form, a coordinate a thread and step; s, t and h stay in registers
//   z = Had(S u)   in shared memory, three stages at a time in registers
//   codes, scale   quantised by comparing; sums run in 16 lanes, as on the CPU
//   D = S Had(q)   the same transform again; e <- t - D, h <- h + D, v <- s
// Reads update and state once and writes the new state and the code: with e 12 bytes a coordinate
// plus bits / 8. Arithmetic is that of csrc/cpu/codes_rotated.h, operation by operation and never
// merged into fma: the same bytes. Sources: see there.
#include "launch.h"
#include "row_table.cuh"
#include "rotation.h"

namespace flcore {
namespace cuda {

constexpr int EACH = 8;  // coordinates of a thread: a block of B has B / EACH threads
constexpr int LANES = 16;

extern __shared__ uint4 shared_words[];

namespace {

// What a launch needs, by value.
struct RotateParams {
  FeedbackArgs f;  // starts, dtype and grads on the device
  PhiloxStream rotation;
  int bits, block, measure;
  bool check;  // only look for values that are not finite
  float centroid[ROTATION_HALF], bound[ROTATION_HALF];
  uint8_t *scales, *codes;
  int32_t* flags;
};

// Shared memory: z with a gap every 32 places, so that threads that are 8 apart meet other banks.
struct Shared {
  float *z, *w;     // transform; terms of a sum
  uint8_t* codes;   // one a byte
  uint32_t* signs;  // one a bit
  int* tops;        // of each thread
  float* lanes;     // [LANES]

  __device__ static int at(int i) { return i + (i >> 5); }
};

constexpr size_t shared_bytes(int64_t block) {
  return size_t(4 * (block + block / 32) + 4 * block + block + block / 8 + 4 * (block / EACH) +
                4 * LANES);
}

__device__ __forceinline__ Shared divide_shared(int block) {
  Shared s;
  s.z = reinterpret_cast<float*>(shared_words);
  s.w = s.z + block + block / 32;
  s.signs = reinterpret_cast<uint32_t*>(s.w + block);
  s.tops = reinterpret_cast<int*>(s.signs + block / 32);
  s.lanes = reinterpret_cast<float*>(s.tops + block / EACH);
  s.codes = reinterpret_cast<uint8_t*>(s.lanes + LANES);
  return s;
}

// ---- feedback ----------------------------------------------------------------------------------

__device__ __forceinline__ float read_value(int dtype, const void* x, int64_t i) {
  switch (dtype) {
    case F64: return __double2float_rn(static_cast<const double*>(x)[i]);
    case F32: return static_cast<const float*>(x)[i];
    case F16: return widen<F16, float>(static_cast<const uint16_t*>(x)[i]);
    default: return widen<BF16, float>(static_cast<const uint16_t*>(x)[i]);
  }
}

__device__ __forceinline__ int64_t find_layer(const FeedbackArgs& f, int64_t i) {
  int64_t low = 0, high = f.layers - 1;  // the last layer that starts at or before i
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (f.starts[middle] <= i)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ __forceinline__ float merge(float a, float x, float b, float y) {  // a x + b y
  return __fadd_rn(__fmul_rn(a, x), __fmul_rn(b, y));
}

struct Form {
  float s, t, u, h;
};

__device__ __forceinline__ Form feedback_form(const FeedbackArgs& f, int64_t i, int64_t& layer) {
  while (i >= f.starts[layer + 1]) ++layer;
  Form x;
  x.s = read_value(f.dtype[layer], f.grads[layer], i - f.starts[layer]);
  if (f.v) x.s = merge(f.p, read_value(f.state_dtype, f.v, i), f.q, x.s);
  x.t = x.u = x.s;
  x.h = f.h ? f.h[i] : 0.0f;
  if (f.e) {
    const float e = read_value(f.state_dtype, f.e, i);
    x.t = __fadd_rn(__fmul_rn(f.b, e), x.s);
    x.u = __fadd_rn(__fmul_rn(f.a, e), x.s);
  }
  if (f.h) {
    x.t = __fsub_rn(x.t, x.h);
    x.u = __fsub_rn(x.u, x.h);
  }
  return x;
}

// A state in its type; bfloat16 goes up with the probability of what does not fit.
__device__ __forceinline__ void write_state(const FeedbackArgs& f, void* state, int64_t i, float x,
                                            uint32_t which) {
  if (f.state_dtype == F32) {
    static_cast<float*>(state)[i] = x;
    return;
  }
  PhiloxStream stream = f.rounding;
  stream.client = which;
  const PhiloxBlock random = philox_block(stream, uint32_t(i >> 3));
  const uint32_t low = i & 2 ? random.w[1] : random.w[0], high = i & 2 ? random.w[3] : random.w[2];
  const uint32_t half = ((i & 4 ? high : low) >> (16 * (i & 1))) & 0xffffu;
  uint32_t bits = __float_as_uint(x) + half;
  if ((bits & 0x7fffffffu) >= 0x7f800000u) bits = __float_as_uint(x);
  static_cast<uint16_t*>(state)[i] = uint16_t(bits >> 16);
}

__device__ __forceinline__ void feedback_store(const FeedbackArgs& f, int64_t i, const Form& x,
                                               float d) {
  if (f.e_new) write_state(f, f.e_new, i, __fsub_rn(x.t, d), 0);
  if (f.h_new) f.h_new[i] = __fadd_rn(x.h, d);
  if (f.v_new) write_state(f, f.v_new, i, f.mask && d != 0.0f ? 0.0f : x.s, 1);
}

// ---- the transform -----------------------------------------------------------------------------

__device__ __forceinline__ void stages(float (&v)[EACH], int count) {
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    if (s == count) return;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (i & (1 << s)) continue;
      const float a = v[i], b = v[i | (1 << s)];
      v[i] = __fadd_rn(a, b);
      v[i | (1 << s)] = __fsub_rn(a, b);
    }
  }
}

// z <- Had(z), m values; every thread of the block calls it. Ends with a barrier.
__device__ void hadamard(const Shared& s, int m) {
  const int t = int(threadIdx.x);
  if (m == int(blockDim.x) * EACH) {
    for (int h = 1; h < m; h *= EACH) {
      const int left = m / h, base = t / h * (h * EACH) + t % h;
      int count = 3;  // stages of this round
      if (left < EACH) count = left == 4 ? 2 : 1;
      float v[EACH];
      if (count == 3) {
#pragma unroll
        for (int k = 0; k < EACH; ++k) v[k] = s.z[Shared::at(base + k * h)];
        stages(v, 3);
#pragma unroll
        for (int k = 0; k < EACH; ++k) s.z[Shared::at(base + k * h)] = v[k];
      } else {  // the last one or two: several groups of a thread side by side
        const int size = 1 << count, groups = EACH / size;
        for (int g = 0; g < groups; ++g) {
          const int first = t + g * int(blockDim.x);
#pragma unroll
          for (int k = 0; k < EACH; ++k) v[k] = k < size ? s.z[Shared::at(first + k * h)] : 0.0f;
          stages(v, count);
#pragma unroll
          for (int k = 0; k < EACH; ++k)
            if (k < size) s.z[Shared::at(first + k * h)] = v[k];
        }
      }
      __syncthreads();
    }
    return;
  }
  for (int h = 1; h < m; h *= 2) {  // the last block, cut short
    for (int p = t; p < m / 2; p += int(blockDim.x)) {
      const int i = Shared::at(p / h * 2 * h + p % h), j = Shared::at(p / h * 2 * h + p % h + h);
      const float a = s.z[i], b = s.z[j];
      s.z[i] = __fadd_rn(a, b);
      s.z[j] = __fsub_rn(a, b);
    }
    __syncthreads();
  }
}

// ---- reductions --------------------------------------------------------------------------------

// The sum of term(i), 0 <= i < m: place i in lane i % 16, lanes in a fixed tree.
template <class Term>
__device__ float lane_sum(const Shared& s, int m, const Term& term) {
  const int t = int(threadIdx.x);
  if (t < LANES) {
    float sum = 0.0f;
#pragma unroll 8
    for (int i = t; i < m; i += LANES) sum = __fadd_rn(sum, term(i));
    s.lanes[t] = sum;
  }
  __syncthreads();
  float a[LANES];
#pragma unroll
  for (int k = 0; k < LANES; ++k) a[k] = s.lanes[k];
#pragma unroll
  for (int width = LANES / 2; width > 0; width /= 2)
#pragma unroll
    for (int k = 0; k < LANES / 2; ++k)
      if (k < width) a[k] = __fadd_rn(a[k], a[k + width]);
  __syncthreads();  // lanes may be written again
  return a[0];
}

// The largest of one number a thread.
__device__ int block_top(const Shared& s, int top) {
  const int t = int(threadIdx.x);
  s.tops[t] = top;
  __syncthreads();
  for (int width = int(blockDim.x) / 2; width > 0; width /= 2) {
    if (t < width && s.tops[t + width] > s.tops[t]) s.tops[t] = s.tops[t + width];
    __syncthreads();
  }
  return s.tops[0];
}

// ---- one block of coordinates ------------------------------------------------------------------

__device__ __forceinline__ float flip(const Shared& s, int i, float x) {
  return __uint_as_float(__float_as_uint(x) ^ ((s.signs[i >> 5] >> (i & 31)) << 31));
}

__device__ __forceinline__ float root_of(int m) {  // m^-1/2 as in csrc/cpu/hadamard.h
  int k = 0;
  while ((1 << k) < m) ++k;
  const float power = __uint_as_float(uint32_t(127 - (k + 1) / 2) << 23);
  return k & 1 ? __fmul_rn(power, 0x1.6a09e6p0f) : power;
}

// Codes of z; z <- q, w <- |q| |z|.
__device__ void quantize_block(const RotateParams& p, const Shared& s, int m, float inverse) {
  const int half = 1 << (p.bits - 1);
  for (int i = int(threadIdx.x); i < m; i += int(blockDim.x)) {
    const float z = s.z[Shared::at(i)];
    const float size = __uint_as_float(__float_as_uint(z) & 0x7fffffffu);
    const float y = __fmul_rn(size, inverse);
    int code = 0;
#pragma unroll
    for (int k = 0; k + 1 < ROTATION_HALF; ++k) code += k + 1 < half && y >= p.bound[k];
    float q = p.centroid[0];  // a run-time index would put the table into local memory
#pragma unroll
    for (int k = 1; k < ROTATION_HALF; ++k) q = code == k ? p.centroid[k] : q;
    s.w[i] = __fmul_rn(q, size);
    s.z[Shared::at(i)] = z < 0.0f ? -q : q;
    s.codes[i] = uint8_t(code | (z < 0.0f ? half : 0));
  }
  __syncthreads();
}

__device__ void write_codes(const RotateParams& p, const Shared& s, int m, uint8_t* out) {
  const int bytes = (m * p.bits + 7) / 8;
  for (int j = int(threadIdx.x); j < bytes; j += int(blockDim.x)) {
    uint32_t byte = 0;
    for (int k = 8 * j / p.bits; k * p.bits < 8 * j + 8 && k < m; ++k) {
      const int shift = k * p.bits - 8 * j;
      byte |= shift < 0 ? uint32_t(s.codes[k]) >> -shift : uint32_t(s.codes[k]) << shift;
    }
    out[j] = uint8_t(byte);
  }
}

__global__ void __launch_bounds__(4096 / EACH, 1)
    rotate_kernel(const __grid_constant__ RotateParams p) {
  const FeedbackArgs& f = p.f;
  const Shared s = divide_shared(p.block);
  const int t = int(threadIdx.x), threads = int(blockDim.x);
  const int64_t index = blockIdx.x, first = index * p.block, left = f.numel - first;
  const int n = left < p.block ? int(left) : p.block;
  int m = 1;
  while (m < n) m *= 2;

  Form x[EACH];
  int top = 0;
  bool finite = true;
  int64_t layer = find_layer(f, first + (t < n ? t : 0));
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = t + k * threads;
    if (i >= n) {
      x[k] = {};
      if (i < m) s.z[Shared::at(i)] = 0.0f;
      continue;
    }
    x[k] = feedback_form(f, first + i, layer);
    s.z[Shared::at(i)] = x[k].u;
    const int key = int(__float_as_uint(x[k].u) & 0x7fffffffu);
    const int other = int(__float_as_uint(x[k].t) & 0x7fffffffu);
    finite = finite && key < 0x7f800000 && other < 0x7f800000;
    top = key > top ? key : top;
  }
  if (!finite) atomicOr(p.flags, 1);
  if (p.check) return;
  for (int k = t; k < (m + 127) / 128; k += threads) {  // four words a block of the stream
    const PhiloxBlock random = philox_block(p.rotation, uint32_t(first >> 7) + uint32_t(k));
#pragma unroll
    for (int w = 0; w < 4; ++w)
      if (32 * (4 * k + w) < m) s.signs[4 * k + w] = random.w[w];
  }
  const uint32_t exponent = uint32_t(block_top(s, top)) >> 23;
  uint32_t power = exponent >= 254 ? 0 : 254 - exponent;
  power = power < 1 ? 1 : power > 253 ? 253 : power;
  const float scale = __uint_as_float(power << 23);
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = t + k * threads;
    if (i < m) s.z[Shared::at(i)] = flip(s, i, __fmul_rn(scale, s.z[Shared::at(i)]));
  }
  __syncthreads();
  const float norm = lane_sum(s, m, [&](int i) {
    const float z = s.z[Shared::at(i)];
    return __fmul_rn(z, z);
  });

  float wire = 0.0f, factor = 0.0f;
  uint8_t* out = p.codes + index * (int64_t(p.block) * p.bits / 8);
  if (norm > 0.0f) {  // the same for all threads of the block
    hadamard(s, m);
    quantize_block(p, s, m, __fdiv_rn(1.0f, __fsqrt_rn(norm)));
    const float root = root_of(m);
    const float dot = __fmul_rn(root, lane_sum(s, m, [&](int i) { return s.w[i]; }));
    float found;
    if (p.measure) {
      const float squares = lane_sum(s, m, [&](int i) {
        const float q = s.z[Shared::at(i)];
        return __fmul_rn(q, q);
      });
      found = __fdiv_rn(dot, squares);
    } else {
      found = __fdiv_rn(norm, dot);
    }
    found = __fmul_rn(found, __uint_as_float((254 - power) << 23));
    wire = found < ROTATION_LARGEST ? found : ROTATION_LARGEST;
    factor = __fmul_rn(wire, root);
    write_codes(p, s, m, out);
    hadamard(s, m);
  } else {
    for (int j = t; j < (m * p.bits + 7) / 8; j += threads) out[j] = 0;
  }
  if (t == 0) reinterpret_cast<float*>(p.scales)[index] = wire;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = t + k * threads;
    if (i >= n) continue;
    const float d = norm > 0.0f ? flip(s, i, __fmul_rn(factor, s.z[Shared::at(i)])) : 0.0f;
    feedback_store(f, first + i, x[k], d);
  }
}

}  // namespace

void launch_rotate(const QuantizeArgs& args, int32_t* flags, int device, uintptr_t stream) {
  if (args.feedback.numel == 0) return;
  RotateParams p = {};
  p.f = args.feedback;
  p.rotation = args.codec.rotation;
  p.bits = args.codec.bits;
  p.block = int(args.codec.bucket);
  p.measure = args.codec.measure;
  p.check = args.check;
  for (int k = 0; k < 1 << (p.bits - 1); ++k) {
    p.centroid[k] = ROTATION_CENTROID[p.bits][k];
    if (k + 1 < 1 << (p.bits - 1)) p.bound[k] = rotation_bound(p.bits, k);
  }
  p.scales = args.scales;
  p.codes = args.codes;
  p.flags = flags;
  const DeviceGuard guard(device);
  start("rotate", &rotate_kernel, (p.f.numel + p.block - 1) / p.block, unsigned(p.block / EACH),
        shared_bytes(p.block), reinterpret_cast<cudaStream_t>(stream), p);
}

}  // namespace cuda
}  // namespace flcore
