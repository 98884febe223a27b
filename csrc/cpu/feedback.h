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
// Where s, t and u come from, at the first coordinate of a block; what is not kept is null.
struct FeedbackSources {
  const float *g, *e, *h, *v;
};

static FeedbackSources feedback_sources(const FeedbackArgs& x, int64_t begin, int64_t count,
                                        int64_t& layer, const FeedbackBuffers& to) {
  return {feedback_gradient(x, begin, count, layer, to.g),
          x.e ? feedback_state(x, x.e, begin, count, to.e) : nullptr, x.h ? x.h + begin : nullptr,
          x.v ? feedback_state(x, x.v, begin, count, to.v) : nullptr};
}

// What a client keeps; SAME: t and u agree.
template <bool E_, bool H_, bool V_, bool SAME_>
struct FeedbackKind {
  static constexpr bool E = E_, H = H_, V = V_, SAME = SAME_;
};

struct FeedbackFactors {
  float a, b, p, q;
};

template <class T>
struct FeedbackValues {
  T s, t, u;
};

template <class Kind, class T>
FLCORE_INLINE FeedbackValues<T> feedback_values(const FeedbackFactors& x,
                                                const FeedbackSources& from, int64_t i) {
  T s = load<T>(from.g + i);
  if constexpr (Kind::V) s = x.p * load<T>(from.v + i) + x.q * s;
  T t = s, u = s;
  if constexpr (Kind::E) {
    const T e = load<T>(from.e + i);
    t = x.b * e + s;
    u = Kind::SAME ? t : x.a * e + s;
  }
  if constexpr (Kind::H) {
    const T h = load<T>(from.h + i);
    t = t - h;
    u = Kind::SAME ? t : u - h;
  }
  return {s, t, u};
}

// Arguments and visitor are copies, so that they can live in registers.
template <class Kind, class Visit>
FLCORE_INLINE bool feedback_each(const FeedbackFactors x, const FeedbackSources from, int64_t head,
                                 int64_t count, Visit& visitor) {
  Visit visit = visitor;
  vi32 tops = {};
  int32_t top = 0;
  const auto one = [&](int64_t i) FLCORE_LAMBDA {
    const FeedbackValues<float> values = feedback_values<Kind, float>(x, from, i);
    top = feedback_larger(top, feedback_key(values.u));
    if constexpr (!Kind::SAME) top = feedback_larger(top, feedback_key(values.t));
    visit.template one<Kind>(i, values);
  };
  int64_t i = 0;
  for (; i < head && i < count; ++i) one(i);
  for (; i + LANES <= count; i += LANES) {
    const FeedbackValues<vf32> values = feedback_values<Kind, vf32>(x, from, i);
    tops = feedback_larger(tops, feedback_key(values.u));
    if constexpr (!Kind::SAME) tops = feedback_larger(tops, feedback_key(values.t));
    visit.template many<Kind>(i, values);
  }
  for (; i < count; ++i) one(i);
  for (int k = 0; k < LANES; ++k) top = feedback_larger(top, tops[k]);
  visitor = visit;
  return uint32_t(top) < 0x7f800000u;
}

// Calls visit.one<Kind>(i, values) for the first `head` of `count` coordinates and for those left
// over, visit.many<Kind>(i, values) for LANES at a time between; false when t or u is not finite
// somewhere.
template <class Visit>
static bool feedback_visit(const FeedbackArgs& x, const FeedbackSources& from, int64_t head,
                           int64_t count, Visit& visit) {
  const FeedbackFactors f = {x.a, x.b, x.p, x.q};
  const auto run = [&](auto e, auto same) {
    constexpr bool E = decltype(e)::value, SAME = decltype(same)::value;
    if (from.h)
      return from.v ? feedback_each<FeedbackKind<E, true, true, SAME>>(f, from, head, count, visit)
                    : feedback_each<FeedbackKind<E, true, false, SAME>>(f, from, head, count, visit);
    return from.v ? feedback_each<FeedbackKind<E, false, true, SAME>>(f, from, head, count, visit)
                  : feedback_each<FeedbackKind<E, false, false, SAME>>(f, from, head, count, visit);
  };
  if (!from.e) return run(Const<0>(), Const<1>());
  return x.a == x.b ? run(Const<1>(), Const<1>()) : run(Const<1>(), Const<0>());
}

struct FeedbackLoad {
  FeedbackBuffers to;

  template <class Kind, class T>
  FLCORE_MEMBER void put(int64_t i, const FeedbackValues<T>& values) {
    if constexpr (Kind::V) store(to.s + i, values.s);
    if constexpr (Kind::E && !Kind::SAME) store(to.t + i, values.t);
    if constexpr (Kind::E || Kind::H) store(to.u + i, values.u);
  }
  template <class Kind>
  FLCORE_MEMBER void one(int64_t i, const FeedbackValues<float>& values) {
    put<Kind>(i, values);
  }
  template <class Kind>
  FLCORE_MEMBER void many(int64_t i, const FeedbackValues<vf32>& values) {
    put<Kind>(i, values);
  }
};

// s, t and u of coordinates [begin, begin + count).
static FeedbackBlock feedback_load(const FeedbackArgs& x, int64_t begin, int64_t count,
                                   int64_t& layer, const FeedbackBuffers& to) {
  const FeedbackSources from = feedback_sources(x, begin, count, layer, to);
  FeedbackLoad load = {to};
  FeedbackBlock block;
  block.finite = feedback_visit(x, from, 0, count, load);
  block.s = from.v ? to.s : from.g;
  block.u = from.e || from.h ? to.u : block.s;
  block.t = from.e && x.a != x.b ? to.t : block.u;
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
