// The memory passes of exact top-k with feedback (csrc/sparsify.cpp puts them together).
//   t = (b e + g) - h,   u = (a e + g) - h     in float32, in this order, no fma; absent terms left out
//   histogram  counts one digit of key(u) = bits(u) & 0x7fffffff for each tile of 65,536 coordinates
//   collect    e <- t everywhere, and (local index, u) of each coordinate with key(u) >= cut
//   emit       the selected entries into the packet; e <- e - D, h <- h + D there, D the decoded value
// With both states: histogram reads 12 B a coordinate and writes none, collect reads 12 and writes 4,
// emit touches k places: 28 B in all. The gradient is a list of layers of any dtype and alignment,
// read where it lies. Integer counts and per-tile regions: the same bits for any number of threads
// and any level. Source: specs econtrol and topk-selection-kernels (Gao et al. 2024; radix select).
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/layers.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "sections are written as stored");

constexpr int64_t BLOCK = 1024;  // coordinates whose keys wait in L1: 4 KiB
constexpr int COPIES = 4;        // interleaved histograms: equal neighbours hit different counters
constexpr int SPARE = SPARSIFY_BINS;  // bin of the keys outside the prefix
constexpr uint32_t INFINITE = 0x7f800000u;

// ---- the affine form, for a vector or one value -----------------------------------------------

FLCORE_INLINE vi32 key_of(vf32 x) { return (vi32)x & 0x7fffffff; }
FLCORE_INLINE int32_t key_of(float x) { return int32_t(bits_of(x) & 0x7fffffffu); }
FLCORE_INLINE vi32 larger(vi32 x, vi32 y) { return x > y ? x : y; }
FLCORE_INLINE int32_t larger(int32_t x, int32_t y) { return x > y ? x : y; }

template <class V>
struct Pair {
  V t, u;
};

// g points at the block, e and h at its first coordinate
template <bool E, bool H, class V>
FLCORE_INLINE Pair<V> affine(const SparsifyArgs& x, const char* g, const char* e, const char* h,
                             int64_t i) {
  const V gv = load<V>(g + 4 * i);
  Pair<V> p = {gv, gv};
  if (E) {
    const V ev = load<V>(e + 4 * i);
    p.t = x.b * ev + gv;
    p.u = x.a * ev + gv;
  }
  if (H) {
    const V hv = load<V>(h + 4 * i);
    p.t = p.t - hv;
    p.u = p.u - hv;
  }
  return p;
}

template <int D>
static void convert(const void* src, int64_t at, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(dst + i, load_f32<D>(src, at + i));
  for (; i < count; ++i) dst[i] = load1<D>(src, at + i);
}

// The gradient of coordinates [begin, begin + count) as contiguous float32: the layer itself where
// it is float32 and covers the block, else `buffer`. `layer` moves forward with the blocks.
static const char* gradient(const SparsifyArgs& x, int64_t begin, int64_t count, int64_t& layer,
                            float* buffer) {
  while (begin >= x.starts[layer + 1]) ++layer;
  if (x.dtype[layer] == F32 && begin + count <= x.starts[layer + 1])
    return static_cast<const char*>(x.grads[layer]) + 4 * (begin - x.starts[layer]);
  for (int64_t done = 0, at = layer; done < count; ++at) {
    const int64_t from = begin + done - x.starts[at], left = x.starts[at + 1] - begin - done;
    const int64_t part = left < count - done ? left : count - done;
    if (part <= 0) continue;  // an empty layer
    if (x.dtype[at] == F64) convert<F64>(x.grads[at], from, part, buffer + done);
    if (x.dtype[at] == F32) convert<F32>(x.grads[at], from, part, buffer + done);
    if (x.dtype[at] == F16) convert<F16>(x.grads[at], from, part, buffer + done);
    if (x.dtype[at] == BF16) convert<BF16>(x.grads[at], from, part, buffer + done);
    done += part;
  }
  return reinterpret_cast<const char*>(buffer);
}

FLCORE_INLINE const char* at_or_null(const float* p, int64_t i) {
  return p ? reinterpret_cast<const char*>(p + i) : nullptr;
}

// ---- histogram --------------------------------------------------------------------------------

// Bin of a key: its digit at `shift`, or SPARE when the bits above are not `prefix`.
FLCORE_INLINE vi32 bin_of(vi32 key, int shift, int width, int prefix) {
  const vi32 digit = (key >> shift) & ((1 << width) - 1);
  return (key >> (shift + width)) == prefix ? digit : digit * 0 + SPARE;
}
FLCORE_INLINE int32_t bin_of(int32_t key, int shift, int width, int prefix) {
  return (key >> (shift + width)) == prefix ? (key >> shift) & ((1 << width) - 1) : SPARE;
}

template <bool E, bool H>
static bool histogram_tile(const SparsifyArgs& x, int64_t tile, int level, uint32_t prefix,
                           uint32_t* out) {
  const int shift = SPARSIFY_SHIFT[level], width = SPARSIFY_WIDTH[level];
  const int64_t begin = tile * SPARSE_TILE;
  const int64_t end = begin + SPARSE_TILE < x.numel ? begin + SPARSE_TILE : x.numel;
  uint16_t counts[COPIES][SPARSIFY_BINS + 8];  // a tile gives one copy at most 16,384 + 1024
  __builtin_memset(counts, 0, sizeof(counts));
  float buffer[BLOCK];
  int32_t bins[BLOCK];
  vi32 top = {};
  int32_t top_tail = 0;
  int64_t layer = find_layer(x.starts, x.layers, begin);
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t count = at + BLOCK < end ? BLOCK : end - at;
    const char* g = gradient(x, at, count, layer, buffer);
    const char *e = at_or_null(x.e, at), *h = at_or_null(x.h, at);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
      const Pair<vf32> p = affine<E, H, vf32>(x, g, e, h, i);
      const vi32 key = key_of(p.u);
      top = larger(top, larger(key, key_of(p.t)));
      store(bins + i, bin_of(key, shift, width, int(prefix)));
    }
    for (; i < count; ++i) {
      const Pair<float> p = affine<E, H, float>(x, g, e, h, i);
      const int32_t key = key_of(p.u);
      top_tail = larger(top_tail, larger(key, key_of(p.t)));
      bins[i] = bin_of(key, shift, width, int(prefix));
    }
    int64_t j = 0;
    for (; j + COPIES <= count; j += COPIES)
      for (int c = 0; c < COPIES; ++c) ++counts[c][bins[j + c]];
    for (; j < count; ++j) ++counts[0][bins[j]];
  }
  for (int b = 0; b < SPARSIFY_BINS; ++b) {
    uint32_t sum = 0;
    for (int c = 0; c < COPIES; ++c) sum += counts[c][b];
    out[b] = sum;
  }
  for (int k = 0; k < LANES; ++k) top_tail = larger(top_tail, top[k]);
  return uint32_t(top_tail) < INFINITE;
}

// ---- collect ----------------------------------------------------------------------------------

FLCORE_INLINE uint32_t lane_mask(vi32 lanes) {  // bit k: the top bit of lane k
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)lanes);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)lanes));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps((__m128)lanes));
#else
  uint32_t mask = 0;
  for (int k = 0; k < LANES; ++k) mask |= uint32_t(lanes[k] < 0) << k;
  return mask;
#endif
}

// Where the candidates of a tile go.
struct Region {
  uint16_t* local;
  float* values;
  int64_t quota;  // entries with key == bound still wanted

  inline __attribute__((always_inline)) void take(int64_t index, float u, int32_t bound) {
    if (key_of(u) == bound && quota-- <= 0) return;
    *local++ = uint16_t(index);
    *values++ = u;
  }
};

template <bool E, bool H>
static void collect_tile(const SparsifyArgs& x, int64_t tile, uint32_t cut, int64_t quota,
                         uint16_t* local, float* values) {
  const int64_t begin = tile * SPARSE_TILE;
  const int64_t end = begin + SPARSE_TILE < x.numel ? begin + SPARSE_TILE : x.numel;
  const int32_t bound = int32_t(cut);
  float buffer[BLOCK];
  int64_t layer = find_layer(x.starts, x.layers, begin);
  Region region = {local, values, quota};
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t count = at + BLOCK < end ? BLOCK : end - at;
    const char* g = gradient(x, at, count, layer, buffer);
    const char *e = at_or_null(x.e, at), *h = at_or_null(x.h, at);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
      const Pair<vf32> p = affine<E, H, vf32>(x, g, e, h, i);
      if (E) store(x.e + at + i, p.t);
      for (uint32_t mask = lane_mask(key_of(p.u) >= bound); mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        region.take(at + i + lane - begin, p.u[lane], bound);
      }
    }
    for (; i < count; ++i) {
      const Pair<float> p = affine<E, H, float>(x, g, e, h, i);
      if (E) x.e[at + i] = p.t;
      if (key_of(p.u) >= bound) region.take(at + i - begin, p.u, bound);
    }
  }
}

// ---- emit -------------------------------------------------------------------------------------

// Writes the value in its wire dtype and returns what a receiver reads. Finite values that would
// round to infinity become the largest finite value; the residual keeps the rest.
template <int D>
FLCORE_INLINE float put_value(void* values, int64_t j, float u) {
  if (D == F32) {
    store(static_cast<char*>(values) + 4 * j, u);
    return u;
  }
  uint16_t raw = D == F16 ? f32_to_f16(u) : f32_to_bf16(u);
  const uint16_t infinite = D == F16 ? 0x7c00u : 0x7f80u;
  if ((raw & 0x7fffu) == infinite) --raw;
  store(static_cast<char*>(values) + 2 * j, raw);
  return D == F16 ? f16_to_f32(raw) : bf16_to_f32(raw);
}

template <int D>
static void emit_tile(const SparsifyArgs& x, const EmitArgs& out, int64_t tile) {
  const int64_t begin = tile * SPARSE_TILE;
  int64_t quota = out.quota[tile], j = out.starts[tile];
  uint8_t* bits = nullptr;
  if (out.bitmask) {
    const int64_t left = x.numel - begin;
    bits = out.indices + begin / 8;
    __builtin_memset(bits, 0, ((left < SPARSE_TILE ? left : SPARSE_TILE) + 7) / 8);
  }
  for (int64_t c = out.candidate_starts[tile]; c < out.candidate_starts[tile + 1]; ++c) {
    const float u = out.candidates[c];
    const uint32_t key = uint32_t(key_of(u));
    if (key < out.tau || (key == out.tau && quota-- <= 0)) continue;
    const uint16_t local = out.local[c];
    if (bits)
      bits[local >> 3] = uint8_t(bits[local >> 3] | 1u << (local & 7));
    else
      store(out.indices + 2 * j, local);
    const float sent = put_value<D>(out.values, j, u);
    if (x.e) x.e[begin + local] = x.e[begin + local] - sent;
    if (x.h) x.h[begin + local] = x.h[begin + local] + sent;
    ++j;
  }
}

// ---- table ------------------------------------------------------------------------------------
// Direct calls inside the parallel loops: through a pointer the compiler would have to plan for
// exceptions, and that plan is a weak symbol.

int64_t tile_count(const SparsifyArgs& x) { return (x.numel + SPARSE_TILE - 1) / SPARSE_TILE; }

template <bool E, bool H>
static bool histogram_all(const SparsifyArgs& x, int level, uint32_t prefix, uint32_t* counts) {
  int32_t bad = 0;
  for_chunks(tile_count(x), x.threads, [&](int64_t t) {
    if (!histogram_tile<E, H>(x, t, level, prefix, counts + t * SPARSIFY_BINS))
      __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
  });
  return bad == 0;
}

bool histogram(const SparsifyArgs& x, int level, uint32_t prefix, uint32_t* counts) {
  if (x.e)
    return x.h ? histogram_all<true, true>(x, level, prefix, counts)
               : histogram_all<true, false>(x, level, prefix, counts);
  return x.h ? histogram_all<false, true>(x, level, prefix, counts)
             : histogram_all<false, false>(x, level, prefix, counts);
}

template <bool E, bool H>
static void collect_all(const SparsifyArgs& x, uint32_t cut, const int64_t* quota,
                        const int64_t* starts, uint16_t* local, float* candidates) {
  for_chunks(tile_count(x), x.threads, [&](int64_t t) {
    collect_tile<E, H>(x, t, cut, quota[t], local + starts[t], candidates + starts[t]);
  });
}

void collect(const SparsifyArgs& x, uint32_t cut, const int64_t* quota, const int64_t* starts,
             uint16_t* local, float* candidates) {
  if (x.e && x.h) collect_all<true, true>(x, cut, quota, starts, local, candidates);
  if (x.e && !x.h) collect_all<true, false>(x, cut, quota, starts, local, candidates);
  if (!x.e && x.h) collect_all<false, true>(x, cut, quota, starts, local, candidates);
  if (!x.e && !x.h) collect_all<false, false>(x, cut, quota, starts, local, candidates);
}

void emit(const SparsifyArgs& x, const EmitArgs& out) {
  for_chunks(tile_count(x), x.threads, [&](int64_t t) {
    if (out.value_dtype == F32) emit_tile<F32>(x, out, t);
    if (out.value_dtype == F16) emit_tile<F16>(x, out, t);
    if (out.value_dtype == BF16) emit_tile<BF16>(x, out, t);
  });
}

}  // namespace
}  // namespace FLCORE_ISA

extern const SparsifyFns FLCORE_TABLE(sparsify);
const SparsifyFns FLCORE_TABLE(sparsify) = {&FLCORE_ISA::histogram, &FLCORE_ISA::collect,
                                            &FLCORE_ISA::emit};

}  // namespace flcore
