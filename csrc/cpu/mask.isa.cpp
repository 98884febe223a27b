// Fixed-point words for sums modulo 2^b, and the masks that hide them.
//   quantize    y = scale x, clipped to [-C, C];  u = (y + C) R / (2 C), at most R, in float64;
//               z = u to the nearest integer (ties to even), or ceil(u) - [r < ceil(u) - u] with
//               r = 2^-32 times element `element + j` of a Philox stream;  out = z + masks
//   add         out = words + masks
//   sum         acc = (acc +) sum of rows
//   dequantize  out = (2 Z - n R) factor: the sum of n words without their n shifts by R / 2
// All words are uint32 modulo 2^b: sums wrap by themselves and are cut to b bits on the way out.
// Masks are ChaCha20 keystreams (cpu/chacha.h); word i of a message always meets word i of a
// stream, wherever the work is cut. quantize reads x once and writes 4 bytes a word, whatever the
// number of masks; sum reads every row once and acc once (4 + 8 / n bytes a value of n rows); masks
// add no traffic. Word arithmetic is exact and float64 element-wise without fma: the same bits at
// every level and for every number of threads.
// Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS
// 2017; the arithmetic of quantize and dequantize is that of SecAgg+ in Flower.
#include "api.h"
#include "cpu/chacha.h"
#include "cpu/chunks.h"
#include "cpu/philox_bits.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

typedef uint32_t vu32h __attribute__((vector_size(VEC_BYTES / 2)));  // LANES64 words

// Words a thread takes at a time: input, random bits and output of a chunk share the L1 cache.
constexpr int64_t CHUNK = 2048;
static_assert(CHUNK % CHACHA_GROUP == 0, "no group of blocks is made twice");

constexpr double TWO52 = 0x1p52;

FLCORE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- conversions, exact: words to float64 and back ----------------------------------------------

FLCORE_INLINE vu64 widen(const vu32h& x) {  // gcc 12 splits the generic conversion into pieces
#if defined(__AVX512F__)
  return (vu64)_mm512_maskz_cvtepu32_epi64(0xff, (__m256i)x);
#elif defined(__AVX2__)
  return (vu64)_mm256_cvtepu32_epi64((__m128i)x);
#else
  return __builtin_convertvector(x, vu64);
#endif
}

FLCORE_INLINE vu32h narrow(const vu64& x) {
#if defined(__AVX512F__)
  return (vu32h)_mm512_maskz_cvtepi64_epi32(0xff, (__m512i)x);
#else
  return __builtin_convertvector(x, vu32h);
#endif
}

// 2^52 + z has z in its low bits, for 0 <= z < 2^52.
FLCORE_INLINE vf64 to_f64(const vu64& z) { return (vf64)(z | 0x4330000000000000u) - TWO52; }
FLCORE_INLINE vu64 to_word(const vf64& z) { return (vu64)(z + TWO52) & 0xffffffffu; }

// ---- masks --------------------------------------------------------------------------------------

// out = words + masks
FLCORE_INLINE void add_words(const uint32_t* words, const uint32_t* masks, int64_t count,
                             uint32_t keep, uint32_t* out) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    store(out + i, (load<vu32>(words + i) + load<vu32>(masks + i)) & keep);
  for (; i < count; ++i)
    store(out + i, (load<uint32_t>(words + i) + load<uint32_t>(masks + i)) & keep);
}

// out[j] = words[j] + masks at position + j, for a chunk
static void add_masks(const MaskSet& set, int64_t position, const uint32_t* words, int64_t count,
                      uint32_t keep, uint32_t* out) {
  const int64_t end = position + count;
  for (int64_t g = position / CHACHA_GROUP; g * CHACHA_GROUP < end; ++g) {
    const int64_t start = g * CHACHA_GROUP;
    const int64_t from = start > position ? start : position;
    alignas(64) uint32_t masks[CHACHA_GROUP];
    masks_of_group(set, g, masks);
    add_words(words + (from - position), masks + (from - start),
              smaller(start + CHACHA_GROUP, end) - from, keep, out + (from - position));
  }
}

// body(first, count) for chunks whose borders are whole groups of blocks of the streams
template <class Body>
static void for_words(int64_t numel, int64_t position, int threads, const Body& body) {
  if (numel == 0) return;
  const int64_t first = position / CHUNK, last = (position + numel - 1) / CHUNK;
  for_chunks(last - first + 1, threads, [&](int64_t c) {
    const int64_t start = (first + c) * CHUNK - position;
    const int64_t from = start > 0 ? start : 0;
    body(from, smaller(start + CHUNK, numel) - from);
  });
}

// ---- quantize -----------------------------------------------------------------------------------

struct Tally {
  vi64 clipped = {}, nonfinite = {};  // minus the number of lanes
};

template <bool STOCHASTIC>
FLCORE_INLINE vu64 level_of(const MaskQuantizeArgs& a, const vf64& x, const vu64& random,
                            Tally& tally) {
  const vf64 high = vf64{} + a.clip, low = -high, top = vf64{} + a.levels;
  vf64 y = x * a.scale;
  tally.nonfinite += ~(x - x == 0.0);
  tally.clipped += (y < low) | (y > high);
  y = y < low ? low : y;
  y = y > high ? high : y;
  vf64 u = (y + high) * a.steps_per_unit;
  u = u > top ? top : u;  // rounding of the product must not make a level above R
  vf64 z = (u + TWO52) - TWO52;
  if constexpr (STOCHASTIC) {
    const vf64 one = vf64{} + 1.0, none = {};
    z += z < u ? one : none;                                  // ceil(u)
    z -= to_f64(random) < (z - u) * 0x1p32 ? one : none;      // r < ceil(u) - u, both times 2^32
  }
  return to_word(z);
}

template <int D, bool STOCHASTIC>
static void quantize_chunk(const MaskQuantizeArgs& a, int64_t from, int64_t count, Tally& tally) {
  alignas(64) uint32_t random[CHUNK];
  if (STOCHASTIC) philox_fill<PhiloxRaw>(a.stream, a.element + from, count, random);
  uint32_t* out = a.out + from;
  int64_t i = 0;
  for (; i + LANES64 <= count; i += LANES64) {
    const vf64 x = load_f64<D>(a.x, from + i);
    const vu64 bits = STOCHASTIC ? widen(load<vu32h>(random + i)) : vu64{};
    store(out + i, narrow(level_of<STOCHASTIC>(a, x, bits, tally)));
  }
  if (i == count) return;
  vf64 x = {};  // the tail, in the same arithmetic; a lane of 0 is neither clipped nor non-finite
  vu64 bits = {};
  for (int64_t k = i; k < count; ++k) {
    x[k - i] = load1_f64<D>(a.x, from + k);
    if (STOCHASTIC) bits[k - i] = random[k];
  }
  const vu64 z = level_of<STOCHASTIC>(a, x, bits, tally);
  for (int64_t k = i; k < count; ++k) store(out + k, uint32_t(z[k - i]));
}

template <int D, bool STOCHASTIC>
static int64_t quantize_all(const MaskQuantizeArgs& a) {
  int64_t clipped = 0, nonfinite = 0;
  for_words(a.numel, a.masks.position, a.threads, [&](int64_t from, int64_t count) {
    Tally tally;
    quantize_chunk<D, STOCHASTIC>(a, from, count, tally);
    uint32_t* out = a.out + from;
    if (a.masks.count) add_masks(a.masks, a.masks.position + from, out, count, a.keep, out);
    int64_t over = 0, bad = 0;
    for (int l = 0; l < LANES64; ++l) {
      over -= tally.clipped[l];
      bad -= tally.nonfinite[l];
    }
    if (over) __atomic_fetch_add(&clipped, over, __ATOMIC_RELAXED);
    if (bad) __atomic_fetch_add(&nonfinite, bad, __ATOMIC_RELAXED);
  });
  return nonfinite ? -1 : clipped;
}

static int64_t quantize(const MaskQuantizeArgs& a) {
#define FLCORE_CASE(D) \
  if (a.dtype == D) return a.stochastic ? quantize_all<D, true>(a) : quantize_all<D, false>(a);
  FLCORE_CASE(F64)
  FLCORE_CASE(F32)
  FLCORE_CASE(F16)
  FLCORE_CASE(BF16)
#undef FLCORE_CASE
  return 0;
}

// ---- add ----------------------------------------------------------------------------------------

static void add(const MaskAddArgs& a) {
  for_words(a.numel, a.masks.position, a.threads, [&](int64_t from, int64_t count) {
    const uint32_t* words = a.words + from;
    uint32_t* out = a.out + from;
    if (a.masks.count)
      add_masks(a.masks, a.masks.position + from, words, count, a.keep, out);
    else
      for (int64_t i = 0; i < count; ++i) store(out + i, load<uint32_t>(words + i) & a.keep);
  });
}

// ---- sum ----------------------------------------------------------------------------------------

constexpr int64_t SUM_CHUNK = 4096;  // of acc, which stays in L1 while the rows pass through

template <int R>
static void add_rows(const uint32_t* const* rows, int64_t from, int64_t count, bool fresh,
                     uint32_t* acc) {
  const uint32_t* p[R];
  for (int r = 0; r < R; ++r) p[r] = rows[r] + from;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    vu32 a = fresh ? vu32{} : load<vu32>(acc + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a += load<vu32>(p[r] + i);
    store(acc + i, a);
  }
  for (; i < count; ++i) {
    uint32_t a = fresh ? 0u : load<uint32_t>(acc + i);
    for (int r = 0; r < R; ++r) a += load<uint32_t>(p[r] + i);
    store(acc + i, a);
  }
}

static void sum(const MaskSumArgs& a) {
  for_chunks((a.numel + SUM_CHUNK - 1) / SUM_CHUNK, a.threads, [&](int64_t c) {
    const int64_t from = c * SUM_CHUNK, count = smaller(SUM_CHUNK, a.numel - from);
    uint32_t* acc = a.acc + from;
    bool fresh = a.fresh;
    int64_t i = 0;
    for (; a.n - i >= 8; i += 8, fresh = false) add_rows<8>(a.rows + i, from, count, fresh, acc);
    for (; a.n - i >= 2; i += 2, fresh = false) add_rows<2>(a.rows + i, from, count, fresh, acc);
    for (; a.n - i >= 1; i += 1, fresh = false) add_rows<1>(a.rows + i, from, count, fresh, acc);
    if (fresh) __builtin_memset(acc, 0, size_t(4 * count));
    if (a.keep != ~0u)
      for (int64_t k = 0; k < count; ++k) store(acc + k, load<uint32_t>(acc + k) & a.keep);
  });
}

// ---- dequantize ---------------------------------------------------------------------------------

template <int D>
static int64_t dequantize_all(const MaskDequantizeArgs& a) {
  int64_t above = 0;
  for_words(a.numel, 0, a.threads, [&](int64_t from, int64_t count) {
    const vf64 top = vf64{} + a.top;
    vi64 over = {};
    int64_t i = 0;
    for (; i + LANES64 <= count; i += LANES64) {
      const vf64 z = to_f64(widen(load<vu32h>(a.words + from + i)));
      over += z > top;
      const vf64 v = (z + z - top) * a.factor;  // the difference is an integer below 2^34: exact
      char* at = static_cast<char*>(a.out) + dtype_bytes(D) * (from + i);
      if constexpr (D == F64)
        store(at, v);
      else if constexpr (D == F32)
        store(at, __builtin_convertvector(v, vf32h));
      else
        for (int k = 0; k < LANES64; ++k) store1<D>(a.out, from + i + k, v[k]);
    }
    int64_t seen = 0;
    for (int l = 0; l < LANES64; ++l) seen -= over[l];
    for (; i < count; ++i) {
      const double z = double(load<uint32_t>(a.words + from + i));
      seen += z > a.top;
      store1<D>(a.out, from + i, (z + z - a.top) * a.factor);
    }
    if (seen) __atomic_fetch_add(&above, seen, __ATOMIC_RELAXED);
  });
  return above;
}

static int64_t dequantize(const MaskDequantizeArgs& a) {
  if (a.dtype == F64) return dequantize_all<F64>(a);
  if (a.dtype == F32) return dequantize_all<F32>(a);
  return a.dtype == F16 ? dequantize_all<F16>(a) : dequantize_all<BF16>(a);
}

}  // namespace
}  // namespace FLCORE_ISA

extern const MaskFns FLCORE_TABLE(mask);
const MaskFns FLCORE_TABLE(mask) = {&FLCORE_ISA::quantize, &FLCORE_ISA::add, &FLCORE_ISA::sum,
                                    &FLCORE_ISA::dequantize};

}  // namespace flcore
