// The update and the memory of a client on the device (FeedbackArgs in api.h has the formulas), as
// csrc/cpu/feedback.h computes them: float32, each operation rounded by itself, in that order.
// starts, dtype and grads of the arguments lie on the device too.
#pragma once

#include "common.cuh"
#include "row_table.cuh"

namespace flcore {
namespace cuda {

template <int N>
struct Form {  // of N coordinates
  float s[N], t[N], u[N];
};

__device__ __forceinline__ float state_value(const FeedbackArgs& x, const void* state, int64_t i) {
  if (x.state_dtype == F32) return static_cast<const float*>(state)[i];
  return widen<BF16, float>(static_cast<const uint16_t*>(state)[i]);
}

// Coordinates at, at + step, ... below `end`, all of one layer; the others are 0. All loads come first.
template <int N>
__device__ __forceinline__ void feedback_load(const FeedbackArgs& x, int64_t layer, int64_t at,
                                              int64_t step, int64_t end, Form<N>& f) {
  const int64_t start = x.starts[layer];
  const void* grad = x.grads[layer];
  float e[N], h[N], v[N];
  with_dtype<double>(x.dtype[layer], [&](auto d) {
    constexpr int D = decltype(d)::value;
    Stored<D> g[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int64_t i = at + k * step;
      g[k] = i < end ? static_cast<const Stored<D>*>(grad)[i - start] : Stored<D>(0);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if constexpr (D == F64)
        f.s[k] = __double2float_rn(g[k]);
      else
        f.s[k] = widen<D, float>(g[k]);
    }
  });
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int64_t i = at + k * step;
    const bool valid = i < end;
    v[k] = x.v && valid ? state_value(x, x.v, i) : 0.0f;
    e[k] = x.e && valid ? state_value(x, x.e, i) : 0.0f;
    h[k] = x.h && valid ? x.h[i] : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (x.v) f.s[k] = __fadd_rn(__fmul_rn(x.p, v[k]), __fmul_rn(x.q, f.s[k]));
    f.t[k] = f.u[k] = f.s[k];
    if (x.e) {
      f.t[k] = __fadd_rn(__fmul_rn(x.b, e[k]), f.s[k]);
      f.u[k] = __fadd_rn(__fmul_rn(x.a, e[k]), f.s[k]);
    }
    if (x.h) {
      f.t[k] = __fsub_rn(f.t[k], h[k]);
      f.u[k] = __fsub_rn(f.u[k], h[k]);
    }
  }
}

__device__ __forceinline__ uint32_t key_of(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ bool is_finite(float t, float u) {
  return max(key_of(t), key_of(u)) < 0x7f800000u;
}

// A state in its type; bfloat16 goes up with the probability of the part that does not fit, never to
// infinity. which: 0 for e, 1 for v.
__device__ __forceinline__ void state_store(const FeedbackArgs& x, void* state, int64_t i,
                                            float value, uint32_t which) {
  if (x.state_dtype == F32) {
    static_cast<float*>(state)[i] = value;
    return;
  }
  PhiloxStream stream = x.rounding;
  stream.client = which;
  const PhiloxBlock random = philox_block(stream, uint32_t(i >> 3));
  const uint32_t low = i & 2 ? random.w[1] : random.w[0], high = i & 2 ? random.w[3] : random.w[2];
  uint32_t bits = __float_as_uint(value) + (((i & 4 ? high : low) >> (16 * (i & 1))) & 0xffffu);
  if ((bits & 0x7fffffffu) >= 0x7f800000u) bits = __float_as_uint(value);
  static_cast<uint16_t*>(state)[i] = uint16_t(bits >> 16);
}

}  // namespace cuda
}  // namespace flcore
