// Bags of table rows: out[b] = sum over entries e of bag b of c_e row[index_e], rows of 2 to 8 bits
// or floating. Reads the rows of the entries once (K bits / 8 bytes, their scales and zeros), and
// writes a bag once: no row of floats is ever stored.
//
//   w = (q - Z) S,  fma(q - 2^(b-1), S, zero),  table[q] S,  fp8(q) S,  or that of a floating row
//   acc = c_1 w_1;  acc = acc + c_e w_e in the order of the entries;  mean: acc / entries
// in float32, rounded once to the dtype of the result. The same function with floating rows is the
// gradient: entries sorted by table row, a bag a row, the gradients of the bags as rows.
//
// Element-wise in the columns, entries in order: the same bits for every level and thread count.
// Threads share bags, and columns where bags are few.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/fma.h"
#include "cpu/fp8.h"
#include "cpu/int_lanes.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t UNIT = 16;       // columns that are decoded together; all have one scale
constexpr int64_t COLUMNS = 1024;  // of a block at most: its sum stays in L1
constexpr int64_t AHEAD = 16;        // entries between a prefetch and its use
constexpr int64_t PREFETCHED = 512;  // bytes of a row; the processor finds the rest by itself
constexpr int PARTS = UNIT / LANES;

// ---- codes of one unit -------------------------------------------------------------------------

// lane i of the result: BITS (i % (32 / BITS)), the place of code i in a word
template <int BITS>
FLCORE_INLINE vu32 shifts() {
  vu32 v;
  for (int k = 0; k < LANES; ++k) v[k] = uint32_t(BITS * (k % (32 / BITS)));
  return v;
}

// `low` begins at the unit, `high` too (3 bits)
template <int BITS>
FLCORE_INLINE vi32 unit_codes(const uint8_t* low, const uint8_t* high, int part) {
  if constexpr (BITS == 8) {
    return load_u8(low + LANES * part);
  } else if constexpr (BITS == 4) {  // a byte to 64 bits: its nibbles become the two halves
    const uint8_t* p = low + LANES / 2 * part;
#if defined(__AVX512F__)
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const vu64 x = (vu64)_mm512_maskz_cvtepu8_epi64(__mmask8(0xff), eight);
#elif defined(__AVX2__)
    const vu64 x = (vu64)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load<int32_t>(p)));
#else
    vu64 x;
    for (int k = 0; k < LANES64; ++k) x[k] = p[k];
#endif
    return (vi32)((x | (x << 28)) & 0x0000000f0000000full);
  } else {
    const uint32_t pairs = load<uint32_t>(low) >> (LANES < 16 ? 2 * LANES * part : 0);
    vu32 v = ((vu32{} + pairs) >> shifts<2>()) & 3u;
    if constexpr (BITS == 3) {
      const uint32_t tops = uint32_t(load<uint16_t>(high)) >> (LANES * part);
      v |= (((vu32{} + tops) >> shifts<1>()) & 1u) << 2;
    }
    return (vi32)v;
  }
}

// ---- one row into the sum of a bag --------------------------------------------------------------

template <bool FIRST>
FLCORE_INLINE void add(float* acc, float c, const vf32& w) {
  if constexpr (FIRST)
    store(acc, c * w);
  else
    store(acc, load<vf32>(acc) + c * w);
}

// What codes q stand for.
template <int BITS, int KIND>
FLCORE_INLINE vf32 values_of(const vi32& q, float scale, float zero, const float* table) {
  if constexpr (KIND == QW_INT)
    return (__builtin_convertvector(q, vf32) - zero) * scale;
  else if constexpr (KIND == QW_FLOAT_ZERO)
    return vfma(__builtin_convertvector(q - (1 << (BITS - 1)), vf32), vf32{} + scale,
                vf32{} + zero);
  else if constexpr (KIND == QW_TABLE)
    return look_up(table, q) * scale;
  else
    return fp8_values(q, fp8_of(KIND)) * scale;
}

// Units of 16 columns with one scale; acc has whole units. Where 16 floats fit in a register, up to
// 16 products c w are made once and looked up: the same bits for fewer instructions.
template <int BITS, int KIND, bool FIRST>
FLCORE_INLINE void add_units(const uint8_t* low, const uint8_t* high, int64_t units, float scale,
                             float zero, const float* table, float c, float* acc) {
  constexpr bool LOOK_UP = LANES == 16 && BITS <= 4;
  [[maybe_unused]] float products[LANES];
  if constexpr (LOOK_UP) {
    vi32 q;
    for (int k = 0; k < LANES; ++k) q[k] = k;
    store(products, c * values_of<BITS, KIND>(q, scale, zero, table));
  }
  for (int64_t u = 0; u < units; ++u)
    unroll<PARTS>([&](auto p) FLCORE_LAMBDA {
      const vi32 q = unit_codes<BITS>(low + 2 * (BITS == 3 ? 2 : BITS) * u, high + 2 * u, p.value);
      float* to = acc + UNIT * u + LANES * p.value;
      vf32 w;
      if constexpr (LOOK_UP)
        w = look_up(products, q);
      else
        w = c * values_of<BITS, KIND>(q, scale, zero, table);
      if constexpr (FIRST)
        store(to, w);
      else
        store(to, load<vf32>(to) + w);
    });
}

template <int BITS, int KIND, bool FIRST>
static void add_row(const QEmbeddingArgs& a, int64_t groups, int64_t row, float c, int64_t begin,
                    int64_t end, float* acc) {
  constexpr int LOW = BITS == 3 ? 2 : BITS;  // bits of the first plane
  const uint8_t* codes = a.codes + row * a.code_stride;
  const uint8_t* tops = codes + (a.k + 3) / 4;
  const float half = float(1 << (BITS - 1));
  for (int64_t k = begin, g = groups == 1 ? 0 : begin / a.group; k < end; ++g) {
    const int64_t left = (g + 1) * a.group - k;
    const int64_t n = left < end - k ? left : end - k, units = n / UNIT;
    const int64_t at = row * groups + g;
    const float scale = load1(a.value_dtype, a.scales, at);
    const float zero = !a.zeros           ? (KIND == QW_INT ? half : 0.0f)
                       : KIND == QW_INT   ? float(static_cast<const uint8_t*>(a.zeros)[at])
                                          : load1(a.value_dtype, a.zeros, at);
    const uint8_t *low = codes + k * LOW / 8, *high = tops + k / 8;
    add_units<BITS, KIND, FIRST>(low, high, units, scale, zero, a.table, c, acc + (k - begin));
    if (const int64_t rest = n - units * UNIT) {  // only at the end of a row
      uint8_t bytes[UNIT] = {}, bits[2] = {};
      __builtin_memcpy(bytes, low + units * 2 * LOW, size_t(rest * LOW + 7) / 8);
      if (BITS == 3) __builtin_memcpy(bits, high + units * 2, size_t(rest + 7) / 8);
      float* to = acc + (k - begin) + units * UNIT;
      add_units<BITS, KIND, FIRST>(bytes, bits, 1, scale, zero, a.table, c, to);
    }
    k += n;
  }
}

// a row of floating values
template <int D, bool FIRST>
static void add_values(const QEmbeddingArgs& a, int64_t, int64_t row, float c, int64_t begin,
                       int64_t end, float* acc) {
  const char* x = reinterpret_cast<const char*>(a.codes) + row * a.code_stride;
  int64_t k = begin;
  for (; k + LANES <= end; k += LANES) add<FIRST>(acc + (k - begin), c, load_f32<D>(x, k));
  for (; k < end; ++k) {
    const float w = c * load1<D>(x, k);
    acc[k - begin] = FIRST ? w : acc[k - begin] + w;
  }
}

typedef void (*AddFn)(const QEmbeddingArgs&, int64_t, int64_t, float, int64_t, int64_t, float*);

template <bool FIRST>
static AddFn add_fn(const QEmbeddingArgs& a) {
  if (a.kind == QE_FLOAT)
    return a.value_dtype == F32   ? &add_values<F32, FIRST>
           : a.value_dtype == F16 ? &add_values<F16, FIRST>
                                  : &add_values<BF16, FIRST>;
  if (a.kind == QW_TABLE) return &add_row<4, QW_TABLE, FIRST>;
  if (a.kind == QW_E4M3) return &add_row<8, QW_E4M3, FIRST>;
  if (a.kind == QW_E5M2) return &add_row<8, QW_E5M2, FIRST>;
#define FLCORE_ADD_ROW(bits) \
  a.kind == QW_INT ? &add_row<bits, QW_INT, FIRST> : &add_row<bits, QW_FLOAT_ZERO, FIRST>
  if (a.bits == 2) return FLCORE_ADD_ROW(2);
  if (a.bits == 3) return FLCORE_ADD_ROW(3);
  if (a.bits == 4) return FLCORE_ADD_ROW(4);
  return FLCORE_ADD_ROW(8);
#undef FLCORE_ADD_ROW
}

// ---- bags --------------------------------------------------------------------------------------

template <int D>
static void write(const float* acc, int64_t n, bool more, void* out, int64_t at) {
  char* to = static_cast<char*>(out) + dtype_bytes(D) * at;
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    vf32 x = load<vf32>(acc + k);
    if (more) x = load_f32<D>(to, k) + x;
    store_lanes<D>(to, k, x);
  }
  for (; k < n; ++k) store1<D>(to, k, more ? load1<D>(to, k) + acc[k] : acc[k]);
}

// Bytes first .. last - 1 of a row and its first scale. Inline: gcc takes a function that only
// prefetches for one without effect and drops the call.
FLCORE_INLINE void prefetch(const QEmbeddingArgs& a, int64_t groups, int64_t row, int64_t first,
                            int64_t last) {
  const uint8_t* p = a.codes + row * a.code_stride;
  for (int64_t at = first; at < last; at += 64) __builtin_prefetch(p + at);
  __builtin_prefetch(p + last - 1);
  if (a.scales) {
    const char* s = static_cast<const char*>(a.scales);
    __builtin_prefetch(s + row * groups * dtype_bytes(a.value_dtype));
  }
}

static void bag(const QEmbeddingArgs& a, AddFn first, AddFn next, int64_t b, int64_t begin,
                int64_t end, float* acc) {
  const int64_t last = a.starts[b + 1], columns = end - begin;
  const int64_t groups = a.scales ? (a.k + a.group - 1) / a.group : 0;
  const int64_t from = a.code_stride * begin / a.k, rest = a.code_stride * end / a.k;
  const int64_t to = rest < from + PREFETCHED ? rest : from + PREFETCHED;
  int64_t count = 0;
  for (int64_t e = a.starts[b]; e < last; ++e) {
    if (e + AHEAD < a.starts[a.bags]) prefetch(a, groups, a.index[e + AHEAD], from, to);
    if (a.index[e] == a.padding) continue;
    const float c = a.coefficients ? a.coefficients[e] : 1.0f;
    (count++ ? next : first)(a, groups, a.index[e], c, begin, end, acc);
  }
  if (!count)
    __builtin_memset(acc, 0, size_t(columns) * 4);
  else if (a.mean && count > 1)
    for (int64_t k = 0; k < columns; ++k) acc[k] /= float(count);
  const int64_t at = (a.rows ? a.rows[b] : b) * a.out_stride + begin;
  if (a.out_dtype == F32)
    write<F32>(acc, columns, a.add, a.out, at);
  else if (a.out_dtype == F16)
    write<F16>(acc, columns, a.add, a.out, at);
  else
    write<BF16>(acc, columns, a.add, a.out, at);
}

void run(const QEmbeddingArgs& a) {
  if (a.bags == 0 || a.k == 0) return;
  int64_t width = COLUMNS;
  if (a.bags < 4 * a.threads) {
    width = (a.k / a.threads + 63) / 64 * 64;
    width = width < 64 ? 64 : width > COLUMNS ? COLUMNS : width;
  }
  const int64_t blocks = (a.k + width - 1) / width;
  const AddFn first = add_fn<true>(a), next = add_fn<false>(a);
  for_chunks(a.bags * blocks, a.threads, [&](int64_t i) {
    alignas(64) float acc[COLUMNS + UNIT];
    const int64_t begin = i % blocks * width, end = begin + width;
    bag(a, first, next, i / blocks, begin, end < a.k ? end : a.k, acc);
  });
}

}  // namespace
}  // namespace FLCORE_ISA

extern const QEmbeddingFns FLCORE_TABLE(qembedding);
const QEmbeddingFns FLCORE_TABLE(qembedding) = {&FLCORE_ISA::run};

}  // namespace flcore
