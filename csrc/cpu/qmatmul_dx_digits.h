// dY W in integers, for dY of 16 bits and codes that are whole numbers:
//   sum_n dY[n] S[n] (q - Z)[n, k] ~ unit sum_n v[n] (q - Z)[n, k],   v = rne(dY[n] S[n] / unit)
// over 256 rows n and the columns of one group. `unit` is the least power of two for which
// |v| < 2^15, so that v + 2^15 has two digits of 8 bits; vpdpbusd multiplies 64 of them with 64
// codes, which makes twice the rate of float32. The sums of a piece are exact. What is lost is
//   |error| <= unit / 2 sum_n |q - Z|,   unit <= 2^-14 max|dY| max|S|  (maxima over the 256 rows),
// for values of one size 1/30 of what rounding dY S to bfloat16 would cost. It grows where one
// value is far larger than the rest; such rows of dY go to the float32 path (`fits_digits`).
//
// A zero that is added to the weights adds sum_n dY[n] zero[n], the same to all columns of a group.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_dx_decode.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t PIECE = 256;                          // rows n that share a unit
constexpr int SUB = 64, SUBS = PIECE / SUB;             // rows n of a vector of digits
constexpr int64_t CODES_BYTES = PIECE * CHUNK_COLUMNS;  // of a chunk: [64 quads][2][16 columns][4]

// A row of dY within a piece: dY = size value, |value| <= top < 1
struct PieceRow {
  float size, top;
};

#if defined(__AVX512VNNI__)

constexpr int DIGIT_ROWS = 6;                   // 24 sums, 2 vectors of codes, 2 of digits
constexpr int64_t DIGITS_BYTES = 2 * PIECE;     // of a row of dY: [SUBS][high, low][SUB]

// Levels of a table as whole numbers of a unit; unit 0: they are none.
struct Levels {
  float unit;
  int8_t level[16];
};

static Levels whole_levels(const float* table) {
  Levels found = {0.0f, {}};
  for (float up = 4.0f; up >= 1.0f; up *= 0.5f) {
    bool whole = true;
    for (int i = 0; i < 16; ++i) {
      const float x = table[i] * up;
      const int8_t q = x >= -127.0f && x <= 127.0f ? int8_t(x) : int8_t(0);
      whole = whole && float(q) == x;
      found.level[i] = q;
    }
    if (whole) {
      found.unit = 1.0f / up;
      break;
    }
  }
  return found;
}

// Whether a call can be computed in integers, row by row of dY.
FLCORE_INLINE bool digits_apply(const QMatmulArgs& a) {
  const QWeight& w = a.w;
  if (a.x_dtype == F32 || !(w.group % CHUNK_COLUMNS == 0 || w.group >= w.k)) return false;
  if (w.kind == QW_TABLE) return whole_levels(w.table).unit != 0;
  return w.kind == QW_FLOAT_ZERO || (w.kind == QW_INT && (w.bits < 8 || !w.zeros));
}

// e with 2^(e - 1) <= |x| < 2^e, and 2^e; x and 2^e are normal numbers
FLCORE_INLINE int exponent_above(float x) { return int(bits_of(x) >> 23 & 0xff) - 126; }
FLCORE_INLINE float power_of_two(int e) { return float_of(uint32_t(e + 127) << 23); }

// ---- dY -----------------------------------------------------------------------------------------

// Largest |x| and the sum of all; NaN and infinity count as infinite or more.
template <int D>
FLCORE_INLINE void measure(const void* x, int64_t count, float* top, float* sum) {
  vu32 most = {};
  vf32 total = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const vu32 u = (vu32)load_f32<D>(x, i) & 0x7fffffffu;
    most = u > most ? u : most;
    total += (vf32)u;
  }
  uint32_t top_bits = 0;
  float all = 0;
  for (int j = 0; j < LANES; ++j) {
    top_bits = most[j] > top_bits ? most[j] : top_bits;
    all += total[j];
  }
  for (; i < count; ++i) {
    const uint32_t u = bits_of(load1<D>(x, i)) & 0x7fffffffu;
    top_bits = u > top_bits ? u : top_bits;
    all += float_of(u);
  }
  *top = float_of(top_bits);
  *sum = all;
}

// A value 64 times as large as the mean of its piece (bfloat16; 12 times for float16, whose
// rounding is 8 times finer) hides so much of the others that, where its own code is Z, the error
// reaches that of rounding the result to the type of dY. And a row with one value gives a row of W
// exactly.
template <int D>
static bool fits_digits(const void* row, int64_t n) {
  constexpr float LIMIT = D == BF16 ? 64.0f : 12.0f;
  const char* x = static_cast<const char*>(row);
  for (int64_t at = 0; at < n; at += PIECE) {
    const int64_t count = n - at < PIECE ? n - at : PIECE;
    float top, sum;
    measure<D>(x + 2 * at, count, &top, &sum);
    if (bits_of(top) == 0) continue;
    if (!(top >= 0x1p-100f && top <= 0x1p100f && top * float(count) <= LIMIT * sum)) return false;
  }
  int64_t values = 0;
  for (int64_t i = 0; i < n && values < 4; ++i) values += (bits_of(load1<D>(x, i)) << 1) != 0;
  return values == 4;
}

// values [PIECE] = row / size, zeros behind `count`
template <int D>
static PieceRow scale_piece(const void* row, int64_t count, float* values) {
  float top, sum;
  measure<D>(row, count, &top, &sum);
  const int e = bits_of(top) ? exponent_above(top) : 0;
  const float down = power_of_two(-e);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(values + i, load_f32<D>(row, i) * down);
  for (; i < count; ++i) values[i] = load1<D>(row, i) * down;
  for (; i < PIECE; ++i) values[i] = 0.0f;
  return PieceRow{power_of_two(e), top * down};
}

// Digits of value scale + 2^15, |value scale| < 2^15. Adding 2^23 rounds to a whole number and
// leaves it in the low bits. Byte b of dword r belongs to n = 16 b + r, as in the codes.
static void split_row(const float* values, const float* scale, int subs, uint8_t* digits) {
  const vf32 magic = splat(8388608.0f + 32768.0f);
  const __m512i order = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
  for (int s = 0; s < subs; ++s) {
    vu32 v[4];
    for (int b = 0; b < 4; ++b) {
      const int at = s * SUB + b * LANES;
      v[b] = (vu32)mac(load<vf32>(values + at), load<vf32>(scale + at), magic);
    }
    const vu32 first = (v[0] & 0xffffu) | (v[1] << 16), second = (v[2] & 0xffffu) | (v[3] << 16);
    const vu32 p = (vu32)_mm512_shuffle_epi8((__m512i)first, order);
    const vu32 q = (vu32)_mm512_shuffle_epi8((__m512i)second, order);
    store(digits + s * 2 * SUB, (p >> 16) | (q & 0xffff0000u));
    store(digits + s * 2 * SUB + SUB, (p & 0xffffu) | (q << 16));
  }
}

// ---- codes --------------------------------------------------------------------------------------

// to [PIECE] = scales or floating zeros of PIECE rows, 0 behind the last block
static void load_piece(const QWeight& w, const void* from, int64_t block, int64_t blocks,
                       int64_t group, float* to) {
  for (int64_t b = 0; b < PIECE / BLOCK_ROWS; ++b)
    if (b < blocks)
      load_16(from, w.scale_dtype, ((block + b) * group_count(w) + group) * BLOCK_ROWS,
              to + b * BLOCK_ROWS);
    else
      store(to + b * BLOCK_ROWS, vf32{});
}

// The scales of PIECE rows: scale [PIECE] = S 2^15 / size, |.| <= top 2^15 < 2^15
static PieceRow scale_rows(const QWeight& w, int64_t block, int64_t blocks, int64_t group,
                           float* scale) {
  load_piece(w, w.scales, block, blocks, group, scale);
  vu32 most = {};
  for (int i = 0; i < PIECE; i += LANES) {
    const vu32 u = load<vu32>(scale + i) & 0x7fffffffu;
    most = u > most ? u : most;
  }
  uint32_t top = 0;
  for (int j = 0; j < LANES; ++j) top = most[j] > top ? most[j] : top;
  int e = exponent_above(float_of(top));
  e = e < -110 ? -110 : e;
  const float up = power_of_two(15 - e);
  for (int i = 0; i < PIECE; i += LANES) store(scale + i, load<vf32>(scale + i) * up);
  return PieceRow{power_of_two(e - 15), float_of(top) * up * 0x1p-15f};
}

static float inner_product(const float* x, const float* y) {
  vf32 sum[2] = {};
  for (int i = 0; i < PIECE; i += 2 * LANES)
    for (int v = 0; v < 2; ++v)
      sum[v] = mac(load<vf32>(x + i + v * LANES), load<vf32>(y + i + v * LANES), sum[v]);
  sum[0] += sum[1];
  float lane[LANES];
  store(lane, sum[0]);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

// Four blocks of turned codes as dwords of four rows n, 16 columns a vector, and what the 2^15 in
// the digits adds to the sums: start [32] -= 128 sum_n codes
static void quads(const uint8_t* turned, uint8_t* codes, int32_t* start) {
  const __m512i ones = _mm512_set1_epi8(-128);  // unsigned: 128
  for (int half = 0; half < 2; ++half) {
    __m512i sum = _mm512_setzero_si512();
    for (int j = 0; j < 4; ++j) {
      __m512i t[4];
      for (int b = 0; b < 4; ++b)
        t[b] = load<__m512i>(turned + b * TURNED_BYTES + turned_at(half, j));
      constexpr __mmask64 ALL64 = ~__mmask64(0);
      constexpr __mmask32 ALL32 = ~__mmask32(0);
      const __m512i low01 = _mm512_maskz_unpacklo_epi8(ALL64, t[0], t[1]);
      const __m512i high01 = _mm512_maskz_unpackhi_epi8(ALL64, t[0], t[1]);
      const __m512i low23 = _mm512_maskz_unpacklo_epi8(ALL64, t[2], t[3]);
      const __m512i high23 = _mm512_maskz_unpackhi_epi8(ALL64, t[2], t[3]);
      // 128-bit lane l: row 4 l + j, columns 4 c .. 4 c + 3
      const __m512i c0 = _mm512_maskz_unpacklo_epi16(ALL32, low01, low23);
      const __m512i c1 = _mm512_maskz_unpackhi_epi16(ALL32, low01, low23);
      const __m512i c2 = _mm512_maskz_unpacklo_epi16(ALL32, high01, high23);
      const __m512i c3 = _mm512_maskz_unpackhi_epi16(ALL32, high01, high23);
      constexpr __mmask16 ALL16 = 0xffff;
      const __m512i a = _mm512_maskz_shuffle_i32x4(ALL16, c0, c1, 0x44);
      const __m512i b = _mm512_maskz_shuffle_i32x4(ALL16, c2, c3, 0x44);
      const __m512i c = _mm512_maskz_shuffle_i32x4(ALL16, c0, c1, 0xee);
      const __m512i d = _mm512_maskz_shuffle_i32x4(ALL16, c2, c3, 0xee);
      const __m512i row[4] = {_mm512_maskz_shuffle_i32x4(ALL16, a, b, 0x88),
                              _mm512_maskz_shuffle_i32x4(ALL16, a, b, 0xdd),
                              _mm512_maskz_shuffle_i32x4(ALL16, c, d, 0x88),
                              _mm512_maskz_shuffle_i32x4(ALL16, c, d, 0xdd)};
      for (int l = 0; l < 4; ++l) {
        store(codes + (4 * l + j) * 128 + half * 64, row[l]);
        sum = _mm512_dpbusd_epi32(sum, ones, row[l]);
      }
    }
    int32_t* at = start + half * HALF;
    store(at, _mm512_sub_epi32(load<__m512i>(at), sum));
  }
}

// PIECE rows (or as many as there are blocks) of `chunks` chunks: codes [chunks][CODES_BYTES],
// start [chunks][32]
static void decode_piece(const QWeight& w, const Levels& levels, int64_t block, int64_t blocks,
                         int64_t chunk, int64_t chunks, uint8_t* codes, int32_t* start) {
  const __m512i level = _mm512_maskz_broadcast_i32x4(0xffff, load<__m128i>(levels.level));
  alignas(64) uint8_t turned[4 * TURNED_BYTES];
  ChunkScales offsets[4];
  for (int b = 0; b < 4; ++b) offsets[b].block = -1;
  __builtin_memset(start, 0, size_t(chunks * CHUNK_COLUMNS * 4));
  for (int64_t s = 0; s < blocks; s += 4)
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t b = 0; b < 4; ++b) {
        uint8_t* to = turned + b * TURNED_BYTES;
        if (s + b < blocks) {
          load_offsets(w, block + s + b, (chunk + c) * CHUNK_COLUMNS, offsets[b]);
          turn_chunk(w.bits, chunk_codes(w, block + s + b, chunk + c), offsets[b].offset, to);
          for (int i = 0; w.kind == QW_TABLE && i < TURNED_BYTES; i += 64)
            store(to + i, _mm512_shuffle_epi8(level, load<__m512i>(to + i)));
        } else {
          __builtin_memset(to, 0, TURNED_BYTES);
        }
      }
      quads(turned, codes + c * CODES_BYTES + s * BLOCK_ROWS * CHUNK_COLUMNS,
            start + c * CHUNK_COLUMNS);
    }
}

// ---- a tile: ROWS rows of dY times 32 columns ---------------------------------------------------

// sums[i] += unit[i] scale (digits codes) + shift[i]
template <int ROWS>
static void add_digits(const uint8_t* digits, const uint8_t* codes, const int32_t* start, int subs,
                       const float* unit, float scale, const float* shift, float* sums,
                       int64_t stride) {
  vi32 high[ROWS][2], low[ROWS][2];
  const vi32 first[2] = {load<vi32>(start), load<vi32>(start + HALF)};
  unroll<2 * ROWS>([&](auto j) FLCORE_LAMBDA {
    constexpr int I = decltype(j)::value / 2, V = decltype(j)::value % 2;
    high[I][V] = first[V];
    low[I][V] = vi32{};
  });
  for (int s = 0; s < subs; ++s)
    for (int r = 0; r < BLOCK_ROWS; ++r) {
      const uint8_t* w = codes + (s * BLOCK_ROWS + r) * 128;
      const uint8_t* x = digits + s * 2 * SUB + r * 4;
      const __m512i w0 = load<__m512i>(w), w1 = load<__m512i>(w + 64);
      unroll<ROWS>([&](auto i) FLCORE_LAMBDA {
        constexpr int I = decltype(i)::value;
        const __m512i h = _mm512_set1_epi32(load<int32_t>(x + I * DIGITS_BYTES));
        const __m512i l = _mm512_set1_epi32(load<int32_t>(x + I * DIGITS_BYTES + SUB));
        high[I][0] = (vi32)_mm512_dpbusd_epi32((__m512i)high[I][0], h, w0);
        high[I][1] = (vi32)_mm512_dpbusd_epi32((__m512i)high[I][1], h, w1);
        low[I][0] = (vi32)_mm512_dpbusd_epi32((__m512i)low[I][0], l, w0);
        low[I][1] = (vi32)_mm512_dpbusd_epi32((__m512i)low[I][1], l, w1);
      });
    }
  unroll<2 * ROWS>([&](auto j) FLCORE_LAMBDA {
    constexpr int I = decltype(j)::value / 2, V = decltype(j)::value % 2;
    const vi32 sum = (high[I][V] << 8) + low[I][V];  // at most 2^15 128 256 = 2^30
    float* at = sums + I * stride + V * HALF;
    const vf32 scaled = (vf32)_mm512_maskz_cvtepi32_ps(0xffff, (__m512i)sum) * scale;
    store(at, mac(scaled, splat(unit[I]), load<vf32>(at) + splat(shift[I])));
  });
}

typedef void AddDigits(const uint8_t*, const uint8_t*, const int32_t*, int, const float*, float,
                       const float*, float*, int64_t);
static AddDigits* const ADD_DIGITS[] = {nullptr,        &add_digits<1>, &add_digits<2>,
                                        &add_digits<3>, &add_digits<4>, &add_digits<5>,
                                        &add_digits<6>};

// sums [rows][stride] += PIECE rows n from `block` on times the columns of `chunks` chunks.
// values [rows][PIECE], head [rows]
static void add_piece(const QWeight& w, const Levels& levels, const float* values,
                      const PieceRow* head, int64_t rows, int64_t block, int64_t chunk,
                      int64_t chunks, uint8_t* codes, int32_t* start, float* sums,
                      int64_t stride) {
  const int64_t all = block_count(w) - block;
  const int64_t blocks = all < PIECE / BLOCK_ROWS ? all : PIECE / BLOCK_ROWS;
  const int subs = int((blocks + 3) / 4);
  decode_piece(w, levels, block, blocks, chunk, chunks, codes, start);
  alignas(64) float scale[2][PIECE], zero[PIECE];
  alignas(64) uint8_t digits[DIGIT_ROWS * DIGITS_BYTES];
  for (int64_t c = 0, end; c < chunks; c = end) {
    const int64_t group = (chunk + c) * CHUNK_COLUMNS / w.group;
    for (end = c + 1; end < chunks && (chunk + end) * CHUNK_COLUMNS / w.group == group;) ++end;
    PieceRow s = scale_rows(w, block, blocks, group, scale[0]);
    if (w.kind == QW_TABLE) s.size *= levels.unit;
    if (w.kind == QW_FLOAT_ZERO) load_piece(w, w.zeros, block, blocks, group, zero);
    for (int i = 0; i < PIECE; i += LANES) store(scale[1] + i, load<vf32>(scale[0] + i) * 2.0f);
    const int64_t tiles = (rows + DIGIT_ROWS - 1) / DIGIT_ROWS;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
      float unit[DIGIT_ROWS], shift[DIGIT_ROWS];
      for (int64_t i = 0; i < count; ++i) {
        const PieceRow h = head[first + i];
        const bool twice = h.top * s.top <= 0.499f;  // one bit more
        unit[i] = twice ? 0.5f * h.size : h.size;
        const float* row = values + (first + i) * PIECE;
        shift[i] = w.kind == QW_FLOAT_ZERO ? h.size * inner_product(row, zero) : 0.0f;
        split_row(row, scale[twice], subs, digits + i * DIGITS_BYTES);
      }
      for (int64_t d = c; d < end; ++d)
        ADD_DIGITS[count](digits, codes + d * CODES_BYTES, start + d * CHUNK_COLUMNS, subs, unit,
                          s.size, shift, sums + first * stride + d * CHUNK_COLUMNS, stride);
    }
  }
}

#endif

}  // namespace FLCORE_ISA
}  // namespace flcore
