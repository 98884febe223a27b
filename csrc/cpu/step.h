// Server optimisers on one tile, applied to the aggregate D while it is still in cache (Hsu et al.,
// arXiv 1909.06335; Reddi et al., ICLR 2021, Algorithm 2; a is the learning rate):
//   sgd       w' = w + a D
//   momentum  m' = b1 m + D                    w' = w + a m'
//   adagrad   m' = b1 m + (1 - b1) D           w' = w + a m' / (sqrt(v') + tau)   for all three
//             v' = v + D^2
//   adam      v' = b2 v + (1 - b2) D^2
//   yogi      v' = v - (1 - b2) D^2 sign(v - D^2)
//   linear    m' = b1 m + b2 D                 w' = (w + a D) + tau m'
// in float32, for float64 models in float64, each operation rounded by itself in the order written
// (no fused multiply-add; square root and quotient correctly rounded), so all levels agree.
#pragma once

#include "api.h"
#include "cpu/normal.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

FLCORE_INLINE float root(float x) { return __builtin_sqrtf(x); }
FLCORE_INLINE double root(double x) { return __builtin_sqrt(x); }

FLCORE_INLINE vf32 root(const vf32& x) { return vsqrt(x); }
FLCORE_INLINE vf64 root(const vf64& x) { return vsqrt(x); }

// Options of a step, rounded once to the type of the arithmetic.
template <class T>
struct StepScalars {
  T lr, beta1, rest1, beta2, rest2, tau;
  explicit StepScalars(const StepArgs& a)
      : lr(T(a.lr)), beta1(T(a.beta1)), rest1(T(1.0 - a.beta1)), beta2(T(a.beta2)),
        rest2(T(1.0 - a.beta2)), tau(T(a.tau)) {}
};

// One value or one vector of them.
template <int KIND, class V, class T>
FLCORE_INLINE void advance(const StepScalars<T>& s, const V& d, V& w, V& m, V& v) {
  if constexpr (KIND == STEP_SGD) {
    w = w + s.lr * d;
  } else if constexpr (KIND == STEP_MOMENTUM) {
    m = s.beta1 * m + d;
    w = w + s.lr * m;
  } else if constexpr (KIND == STEP_LINEAR) {
    m = s.beta1 * m + s.beta2 * d;
    w = (w + s.lr * d) + s.tau * m;
  } else {
    m = s.beta1 * m + s.rest1 * d;
    const V square = d * d;
    if constexpr (KIND == STEP_ADAGRAD) {
      v = v + square;
    } else if constexpr (KIND == STEP_ADAM) {
      v = s.beta2 * v + s.rest2 * square;
    } else {
      const V part = s.rest2 * square;
      const V down = v - part, up = v + part;
      const V other = v == square ? v : up;  // a NaN goes up and stays
      v = v > square ? down : other;
    }
    w = w + (s.lr * m) / (root(v) + s.tau);
  }
}

constexpr bool step_has_m(int kind) { return kind != STEP_SGD; }
constexpr bool step_has_v(int kind) { return kind > STEP_MOMENTUM && kind != STEP_LINEAR; }

// d: T [m] -> new model, state and copy. Returns STEP_NONFINITE when a new value is not finite.
template <int KIND, int W, class T, class V>
static int step_kind(const StepArgs& a, int64_t layer, int64_t offset, const T* d, int64_t m) {
  constexpr int64_t WIDTH = int64_t(sizeof(V) / sizeof(T));
  constexpr bool HAS_M = step_has_m(KIND), HAS_V = step_has_v(KIND);
  const StepScalars<T> s(a);
  const void* model = a.model[layer];
  void* next = a.new_model[layer];
  void* copy = a.copy ? a.copy[layer] : nullptr;
  const T* m_old = HAS_M ? static_cast<const T*>(a.m[layer]) + offset : nullptr;
  const T* v_old = HAS_V ? static_cast<const T*>(a.v[layer]) + offset : nullptr;
  T* m_new = HAS_M ? static_cast<T*>(a.new_m[layer]) + offset : nullptr;
  T* v_new = HAS_V ? static_cast<T*>(a.new_v[layer]) + offset : nullptr;
  V bad = {};
  int64_t i = 0;
  for (; i + WIDTH <= m; i += WIDTH) {
    V w, first = {}, second = {};
    if constexpr (W == F64)
      w = load_f64<W>(model, offset + i);
    else
      w = load_f32<W>(model, offset + i);
    if constexpr (HAS_M) first = load<V>(m_old + i);
    if constexpr (HAS_V) second = load<V>(v_old + i);
    advance<KIND>(s, load<V>(d + i), w, first, second);
    if constexpr (HAS_M) store(m_new + i, first);
    if constexpr (KIND == STEP_LINEAR) bad = bad + first * T(0);  // tau may be 0: w hides it then
    if constexpr (HAS_V) {
      store(v_new + i, second);
      bad = bad + second * T(0);
    }
    store_lanes<W>(next, offset + i, w);
    if constexpr (W == F16 || W == BF16) w = load_f32<W>(next, offset + i);  // as stored
    bad = bad + w * T(0);  // NaN for NaN and infinity
    if (copy && a.copy_dtype == F16) store_lanes<F16>(copy, offset + i, w);
    if (copy && a.copy_dtype == BF16) store_lanes<BF16>(copy, offset + i, w);
  }
  T rest = 0;
  for (; i < m; ++i) {
    T w, first = 0, second = 0;
    if constexpr (W == F64)
      w = load1_f64<W>(model, offset + i);
    else
      w = load1<W>(model, offset + i);
    if constexpr (HAS_M) first = load<T>(m_old + i);
    if constexpr (HAS_V) second = load<T>(v_old + i);
    advance<KIND>(s, d[i], w, first, second);
    if constexpr (HAS_M) store(m_new + i, first);
    if constexpr (KIND == STEP_LINEAR) rest = rest + first * T(0);
    if constexpr (HAS_V) store(v_new + i, second);
    store1<W>(next, offset + i, w);
    if constexpr (W == F16 || W == BF16) w = load1<W>(next, offset + i);
    rest = rest + (w * T(0) + second * T(0));
    if (copy && a.copy_dtype == F16) store1<F16>(copy, offset + i, w);
    if (copy && a.copy_dtype == BF16) store1<BF16>(copy, offset + i, w);
  }
  for (int k = 0; k < WIDTH; ++k) rest = rest + bad[k];
  return rest == 0 ? 0 : STEP_NONFINITE;
}

template <int W, class T, class V>
static int step_tile(const StepArgs& a, int64_t layer, int64_t offset, const T* d, int64_t m) {
  switch (a.kind) {
    case STEP_SGD: return step_kind<STEP_SGD, W, T, V>(a, layer, offset, d, m);
    case STEP_MOMENTUM: return step_kind<STEP_MOMENTUM, W, T, V>(a, layer, offset, d, m);
    case STEP_ADAGRAD: return step_kind<STEP_ADAGRAD, W, T, V>(a, layer, offset, d, m);
    case STEP_ADAM: return step_kind<STEP_ADAM, W, T, V>(a, layer, offset, d, m);
    case STEP_YOGI: return step_kind<STEP_YOGI, W, T, V>(a, layer, offset, d, m);
    default: return step_kind<STEP_LINEAR, W, T, V>(a, layer, offset, d, m);
  }
}

static inline int step_tile(const StepArgs& a, int64_t layer, int64_t offset, const float* d,
                            int64_t m) {
  switch (a.model_dtype[layer]) {
    case F32: return step_tile<F32, float, vf32>(a, layer, offset, d, m);
    case F16: return step_tile<F16, float, vf32>(a, layer, offset, d, m);
    default: return step_tile<BF16, float, vf32>(a, layer, offset, d, m);
  }
}
static inline int step_tile(const StepArgs& a, int64_t layer, int64_t offset, const double* d,
                            int64_t m) {
  return step_tile<F64, double, vf64>(a, layer, offset, d, m);
}

// d[i] += noise_std z with z standard normal, drawn at the coordinate's place in the layer's stream
template <class T>
static void add_noise(const StepArgs& a, int64_t layer, int64_t offset, T* d, int64_t m) {
  constexpr int64_t BLOCK = 1024;
  alignas(64) float z[BLOCK];
  PhiloxStream stream = a.noise;
  stream.tensor = a.tensor[layer];
  const T std = T(a.noise_std);
  for (int64_t at = 0; at < m; at += BLOCK) {
    const int64_t count = m - at < BLOCK ? m - at : BLOCK;
    normal_tile(stream, offset + at, z, count);
    for (int64_t i = 0; i < count; ++i) d[at + i] = d[at + i] + std * T(z[i]);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
