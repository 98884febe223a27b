// The update and the memory of a client, block by block (FeedbackArgs in api.h has the formulas).
// Encoders call feedback_load for a block, decide what is sent, and call feedback_store with what a
// receiver decodes. A block lives in L1 or L2 between the two, so memory sees each state once:
// reads g and the states, writes e, h, v: 12 bytes a coordinate with e (4 of them written), 20 with
// e and h. The gradient is a list of layers of any dtype and alignment, read where it lies.
// Element by element without fma: the same bits at every level and for every way of cutting.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/layers.h"
#include "cpu/philox_bits.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// Scratch of one block; each part holds as many floats as the longest block.
struct FeedbackBuffers {
  float *g, *e, *v, *s, *t, *u;
};
constexpr int FEEDBACK_PARTS = 6;

FLCORE_INLINE FeedbackBuffers feedback_buffers(float* memory, int64_t longest) {
  return {memory,               memory + longest,     memory + 2 * longest,
          memory + 3 * longest, memory + 4 * longest, memory + 5 * longest};
}

struct FeedbackBlock {
  const float *s, *t, *u;  // some may be the same memory, or the gradient itself, not aligned: load<>
  bool finite;             // t and u everywhere
};

template <int D>
static void feedback_convert(const void* src, int64_t at, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(dst + i, load_f32<D>(src, at + i));
  for (; i < count; ++i) dst[i] = load1<D>(src, at + i);
}

static void feedback_convert(int dtype, const void* src, int64_t at, int64_t count, float* dst) {
  if (dtype == F64) feedback_convert<F64>(src, at, count, dst);
  if (dtype == F32) feedback_convert<F32>(src, at, count, dst);
  if (dtype == F16) feedback_convert<F16>(src, at, count, dst);
  if (dtype == BF16) feedback_convert<BF16>(src, at, count, dst);
}

// The gradient of coordinates [begin, begin + count) as contiguous float32 (perhaps not aligned): the
// layer itself where it is float32 and covers the block, else `buffer`. `layer` moves forward with
// the blocks; start it with find_layer.
static const float* feedback_gradient(const FeedbackArgs& x, int64_t begin, int64_t count,
                                      int64_t& layer, float* buffer) {
  while (begin >= x.starts[layer + 1]) ++layer;
  if (x.dtype[layer] == F32 && begin + count <= x.starts[layer + 1])
    return reinterpret_cast<const float*>(static_cast<const char*>(x.grads[layer]) +
                                          4 * (begin - x.starts[layer]));
  for (int64_t done = 0, at = layer; done < count; ++at) {
    const int64_t from = begin + done - x.starts[at], left = x.starts[at + 1] - begin - done;
    const int64_t part = left < count - done ? left : count - done;
    if (part <= 0) continue;  // an empty layer
    feedback_convert(x.dtype[at], x.grads[at], from, part, buffer + done);
    done += part;
  }
  return buffer;
}

// [begin, begin + count) of a state as float32
FLCORE_INLINE const float* feedback_state(const FeedbackArgs& x, const void* state, int64_t begin,
                                          int64_t count, float* buffer) {
  if (x.state_dtype == F32) return static_cast<const float*>(state) + begin;
  feedback_convert<BF16>(state, begin, count, buffer);
  return buffer;
}

FLCORE_INLINE vi32 feedback_key(const vf32& x) { return (vi32)x & 0x7fffffff; }
FLCORE_INLINE int32_t feedback_key(float x) { return int32_t(bits_of(x) & 0x7fffffffu); }
FLCORE_INLINE vi32 feedback_larger(const vi32& x, const vi32& y) { return x > y ? x : y; }
FLCORE_INLINE int32_t feedback_larger(int32_t x, int32_t y) { return x > y ? x : y; }

// SAME: a and b are equal, hence t and u, and t is left out.
template <bool E, bool H, bool V, bool SAME, class T, class K>
FLCORE_INLINE void feedback_form(const FeedbackArgs& x, const float* g, const float* e,
                                 const float* h, const float* v, const FeedbackBuffers& to,
                                 int64_t i, K& top) {
  T s = load<T>(g + i);
  if constexpr (V) {
    s = x.p * load<T>(v + i) + x.q * s;
    store(to.s + i, s);
  }
  T t = s, u = s;
  if constexpr (E) {
    const T ev = load<T>(e + i);
    if constexpr (!SAME) t = x.b * ev + s;
    u = x.a * ev + s;
  }
  if constexpr (H) {
    const T hv = load<T>(h + i);
    if constexpr (!SAME) t = t - hv;
    u = u - hv;
  }
  if constexpr (E && !SAME) store(to.t + i, t);
  if constexpr (E || H) store(to.u + i, u);
  top = feedback_larger(top, feedback_key(u));
  if constexpr (!SAME) top = feedback_larger(top, feedback_key(t));
}

template <bool E, bool H, bool V, bool SAME>
static bool feedback_block(const FeedbackArgs& x, const float* g, const float* e, const float* h,
                           const float* v, const FeedbackBuffers& to, int64_t count) {
  vi32 tops = {};
  int32_t top = 0;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    feedback_form<E, H, V, SAME, vf32>(x, g, e, h, v, to, i, tops);
  for (; i < count; ++i) feedback_form<E, H, V, SAME, float>(x, g, e, h, v, to, i, top);
  for (int k = 0; k < LANES; ++k) top = feedback_larger(top, tops[k]);
  return uint32_t(top) < 0x7f800000u;
}

template <bool E, bool SAME>
static bool feedback_block(const FeedbackArgs& x, const float* g, const float* e, const float* h,
                           const float* v, const FeedbackBuffers& to, int64_t count) {
  if (h)
    return v ? feedback_block<E, true, true, SAME>(x, g, e, h, v, to, count)
             : feedback_block<E, true, false, SAME>(x, g, e, h, v, to, count);
  return v ? feedback_block<E, false, true, SAME>(x, g, e, h, v, to, count)
           : feedback_block<E, false, false, SAME>(x, g, e, h, v, to, count);
}

// s, t and u of coordinates [begin, begin + count).
static FeedbackBlock feedback_load(const FeedbackArgs& x, int64_t begin, int64_t count,
                                   int64_t& layer, const FeedbackBuffers& to) {
  const float* g = feedback_gradient(x, begin, count, layer, to.g);
  const float* e = x.e ? feedback_state(x, x.e, begin, count, to.e) : nullptr;
  const float* v = x.v ? feedback_state(x, x.v, begin, count, to.v) : nullptr;
  const float* h = x.h ? x.h + begin : nullptr;
  FeedbackBlock block;
  const bool same = !e || x.a == x.b;
  if (!e)
    block.finite = feedback_block<false, true>(x, g, e, h, v, to, count);
  else if (same)
    block.finite = feedback_block<true, true>(x, g, e, h, v, to, count);
  else
    block.finite = feedback_block<true, false>(x, g, e, h, v, to, count);
  block.s = v ? to.s : g;
  block.u = e || h ? to.u : block.s;
  block.t = same ? block.u : to.t;
  return block;
}

// Stores past the caches where the line is whole: memory that is written and not read need not be
// fetched first. Call feedback_fence() before another thread may read.
FLCORE_INLINE void stream(float* p, const vf32& x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}
FLCORE_INLINE void feedback_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Random bits of a stored bfloat16: 16 of each coordinate, two coordinates a word.
FLCORE_INLINE uint32_t feedback_half(const PhiloxStream& s, int64_t i) {
  const PhiloxBlock b = philox_block(s, uint32_t(i >> 3));
  return (b.w[(i >> 1) & 3] >> (16 * (i & 1))) & 0xffffu;
}

// x as bfloat16: up with the probability of the part that does not fit; never to infinity.
FLCORE_INLINE uint16_t feedback_bf16(float x, uint32_t half) {
  uint32_t u = bits_of(x) + half;
  if ((u & 0x7fffffffu) >= 0x7f800000u) u = bits_of(x);
  return uint16_t(u >> 16);
}

static void feedback_store_bf16(const FeedbackArgs& x, void* state, int64_t begin, int64_t count,
                                const float* values, uint32_t which) {
  PhiloxStream s = x.rounding;
  s.client = which;  // e and v round independently
  uint16_t* out = static_cast<uint16_t*>(state) + begin;
  for (int64_t i = 0; i < count;) {
    const int64_t at = begin + i;
    const PhiloxBlock b = philox_block(s, uint32_t(at >> 3));
    for (int64_t k = at & 7; k < 8 && i < count; ++k, ++i)
      out[i] = feedback_bf16(load<float>(values + i), (b.w[k >> 1] >> (16 * (k & 1))) & 0xffffu);
  }
}

// out[i] = value(i), past the caches when `fresh`; a functor with both a vector and a scalar form
template <class Value>
FLCORE_INLINE void feedback_write(float* out, int64_t count, bool fresh, const Value& value) {
  int64_t i = 0;
  if (fresh) {
    const int64_t off = int64_t(reinterpret_cast<uintptr_t>(out) & 63u) / 4;
    const int64_t head = (16 - off) & 15;
    for (; i < head && i < count; ++i) out[i] = value.one(i);
    for (; i + 16 <= count; i += 16)
      for (int64_t k = 0; k < 16; k += LANES) stream(out + i + k, value.many(i + k));
  } else {
    for (; i + LANES <= count; i += LANES) store(out + i, value.many(i));
  }
  for (; i < count; ++i) out[i] = value.one(i);
}

struct FeedbackCopy {
  const float* x;
  FLCORE_MEMBER float one(int64_t i) const { return load<float>(x + i); }
  FLCORE_MEMBER vf32 many(int64_t i) const { return load<vf32>(x + i); }
};
struct FeedbackRest {  // t - D
  const float *t, *d;
  FLCORE_MEMBER float one(int64_t i) const { return load<float>(t + i) - d[i]; }
  FLCORE_MEMBER vf32 many(int64_t i) const { return load<vf32>(t + i) - load<vf32>(d + i); }
};
struct FeedbackSum {  // h + D
  const float *h, *d;
  FLCORE_MEMBER float one(int64_t i) const { return h[i] + d[i]; }
  FLCORE_MEMBER vf32 many(int64_t i) const { return load<vf32>(h + i) + load<vf32>(d + i); }
};

// New state of coordinates [begin, begin + count) after D was sent; d null: nothing was (e <- t,
// h <- h, v <- s). `scratch`: count floats, may be the block's own t. Where `mask` is set, v becomes 0
// at coordinates with d != 0.
static inline void feedback_store(const FeedbackArgs& x, int64_t begin, int64_t count,
                           const FeedbackBlock& block, const float* d, float* scratch) {
  if (x.e_new) {
    if (x.state_dtype == BF16) {
      for (int64_t i = 0; i < count; ++i) scratch[i] = load<float>(block.t + i) - (d ? d[i] : 0.0f);
      feedback_store_bf16(x, x.e_new, begin, count, scratch, 0);
    } else {
      float* out = static_cast<float*>(x.e_new) + begin;
      const bool fresh = x.e_new != x.e;
      if (d)
        feedback_write(out, count, fresh, FeedbackRest{block.t, d});
      else
        feedback_write(out, count, fresh, FeedbackCopy{block.t});
    }
  }
  if (x.h_new && (d || x.h_new != x.h)) {
    if (d)
      feedback_write(x.h_new + begin, count, x.h_new != x.h, FeedbackSum{x.h + begin, d});
    else
      feedback_write(x.h_new + begin, count, x.h_new != x.h, FeedbackCopy{x.h + begin});
  }
  if (x.v_new) {
    const float* s = block.s;
    if (x.mask && d) {
      for (int64_t i = 0; i < count; ++i) scratch[i] = d[i] != 0 ? 0.0f : load<float>(s + i);
      s = scratch;
    }
    if (x.state_dtype == BF16)
      feedback_store_bf16(x, x.v_new, begin, count, s, 1);
    else
      feedback_write(static_cast<float*>(x.v_new) + begin, count, x.v_new != x.v, FeedbackCopy{s});
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
