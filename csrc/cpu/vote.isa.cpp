// Majority of n packed signs, bit 1 = negative (Bernstein et al., "signSGD with Majority Vote",
// ICLR 2019):
//   negatives_j = sum_i bit_ij;   vote_j = -1 where 2 negatives_j > n, +1 where <, a tie where =
//   with weights: V_j = sum_i w_i s_ij in float32, in list order, each sum rounded; vote_j = sign
//   V_j
// Counts are bit-sliced: plane p holds bit p of the counts of all coordinates, and carry-save
// adders add eight rows of whole registers to the planes with seven full adders; the planes of a
// tile stay in the first-level cache. Reads n/8 and writes 1/8 bytes a coordinate (4 as float32):
// about one logical operation for each row and register of 128 to 512 coordinates. Unpacking takes
// one for each coordinate. Weighted votes add +-w, n additions a coordinate.
//
// Buckets start at a byte each, so that rows with buckets of whole bytes are one string of bits;
// others are brought into that form, eight rows of a tile at a time.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bits are read as words");

constexpr int64_t TILE = 2048;      // bytes of bits of a row: 16,384 coordinates
constexpr int64_t PAD = TILE + 64;  // a row of scratch, whole registers
constexpr int64_t GROUP = 8;        // rows added at once
constexpr int64_t SUMS = 4 * 8 * TILE;

int64_t planes_of(int64_t n) {
  int64_t planes = 3;
  while (n >> planes) ++planes;
  return planes;
}

int64_t scratch_bytes(int64_t n) { return PAD * (planes_of(n) + GROUP + 1) + SUMS; }

struct Workspace {
  uint8_t* planes;  // [planes][PAD]
  uint8_t* rows;    // [GROUP][PAD] rows that had to be brought into one string
  uint8_t* zeros;   // [PAD] takes the place of rows beyond the last
  float* sums;      // [8 TILE]
};

Workspace workspace(const VoteArgs& a, int64_t thread) {
  uint8_t* base = static_cast<uint8_t*>(a.scratch) + thread * scratch_bytes(a.n);
  uint8_t* rows = base + planes_of(a.n) * PAD;
  uint8_t* zeros = rows + GROUP * PAD;
  return {base, rows, zeros, reinterpret_cast<float*>(zeros + PAD)};
}

// ---- bits at any place
// ---------------------------------------------------------------------------

// Up to 8 bytes, fewer at the end of what may be read.
FLCORE_INLINE uint64_t load_word(const uint8_t* p, int64_t bytes) {
  uint64_t word = 0;
  __builtin_memcpy(&word, p, bytes < 8 ? size_t(bytes) : 8);
  return word;
}

// to[at ..] |= `count` bits of `from`, beginning with bit `first`; `to` is zero there.
void copy_bits(const uint8_t* from, int64_t first, int64_t count, uint8_t* to, int64_t at) {
  const int64_t last_byte = (first + count + 7) / 8;
  while (count > 0) {
    const int64_t byte = first / 8;
    const uint64_t word = load_word(from + byte, last_byte - byte) >> (first % 8);
    int64_t step = 56 - at % 8;  // what fits into 8 bytes on both sides
    step = step < 56 - first % 8 ? step : 56 - first % 8;
    step = step < count ? step : count;
    const uint64_t bits = (word & ((uint64_t(1) << step) - 1)) << (at % 8);
    store(to + at / 8, load<uint64_t>(to + at / 8) | bits);
    first += step;
    at += step;
    count -= step;
  }
}

// Coordinates begin .. begin + m - 1 of a row as one string of bits.
const uint8_t* open_row(const VoteRow& r, int64_t begin, int64_t m, uint8_t* scratch) {
  if (r.bucket % 8 == 0) return r.bits + begin / 8;  // begin is a multiple of 8
  __builtin_memset(scratch, 0, size_t(PAD));
  const int64_t bytes = (r.bucket + 7) / 8;
  for (int64_t at = 0; at < m;) {
    const int64_t bucket = (begin + at) / r.bucket, first = (begin + at) % r.bucket;
    const int64_t rest = r.bucket - first, count = rest < m - at ? rest : m - at;
    copy_bits(r.bits + bucket * bytes, first, count, scratch, at);
    at += count;
  }
  return scratch;
}

// ---- counting
// ------------------------------------------------------------------------------------

// a, b, c of weight 1 -> `a` of weight 1, returns the carry, of weight 2
FLCORE_INLINE vu64 full_add(vu64& a, const vu64& b, const vu64& c) {
  const vu64 half = a ^ b;
  const vu64 carry = (a & b) | (half & c);
  a = half ^ c;
  return carry;
}

FLCORE_INLINE vu64 load_part(const uint8_t* p, int64_t bytes) {
  vu64 v = {};
  __builtin_memcpy(&v, p, size_t(bytes));
  return v;
}

// Adds eight rows to the planes, `bytes` of them at offset i, a register or the rest of a tile.
template <bool WHOLE>
FLCORE_INLINE void add_eight(const uint8_t* const* p, uint8_t* planes, int64_t count, int64_t i,
                             int64_t bytes) {
  const auto row = [&](int r) FLCORE_LAMBDA {
    return WHOLE ? load<vu64>(p[r] + i) : load_part(p[r] + i, bytes);
  };
  uint8_t* at = planes + i;
  vu64 ones = load<vu64>(at), twos = load<vu64>(at + PAD), fours = load<vu64>(at + 2 * PAD);
  const vu64 two_a = full_add(ones, row(0), row(1)), two_b = full_add(ones, row(2), row(3));
  const vu64 four_a = full_add(twos, two_a, two_b);
  const vu64 two_c = full_add(ones, row(4), row(5)), two_d = full_add(ones, row(6), row(7));
  const vu64 four_b = full_add(twos, two_c, two_d);
  vu64 carry = full_add(fours, four_a, four_b);
  store(at, ones);
  store(at + PAD, twos);
  store(at + 2 * PAD, fours);
  for (int64_t k = 3; k < count; ++k) {
    const vu64 plane = load<vu64>(at + k * PAD);
    store(at + k * PAD, plane ^ carry);
    carry = plane & carry;
  }
}

// `above`: counts beyond half of n; `equal`: exactly half. Both go where planes 0 and 1 were.
void compare(uint8_t* planes, int64_t count, int64_t n, int64_t bytes) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < bytes; i += VEC_BYTES) {
    vu64 above = {}, equal = ~vu64{};
    for (int64_t k = count - 1; k >= 0; --k) {
      const vu64 plane = load<vu64>(planes + k * PAD + i);
      if ((half >> k) & 1) {
        equal = equal & plane;
      } else {
        above = above | (equal & plane);
        equal = equal & ~plane;
      }
    }
    if (n % 2) equal = vu64{};
    store(planes + i, above);
    store(planes + PAD + i, equal);
  }
}

// ---- bits to float32 and back
// --------------------------------------------------------------------

// All ones in the lanes whose bit is set.
FLCORE_INLINE vu32 lanes_of(uint32_t bits) {
  vu32 place;
  for (int k = 0; k < LANES; ++k) place[k] = 1u << k;
  return (vu32)((place & bits) != 0);
}

FLCORE_INLINE uint32_t bits_at(const uint8_t* p, int64_t i) {  // of lanes i .. i + LANES - 1
  if constexpr (LANES == 16) return load<uint16_t>(p + i / 8);
  if constexpr (LANES == 8) return p[i / 8];
  return uint32_t(p[i / 8]) >> (i % 8);
}

constexpr uint32_t SIGN_BIT = 0x80000000u;

void write_signs(const uint8_t* above, const uint8_t* equal, int64_t m, float* out) {
  const vu32 one = (vu32)(vf32{} + 1.0f);
  int64_t i = 0;
  for (; i + LANES <= m; i += LANES) {
    const vu32 sign = one | (lanes_of(bits_at(above, i)) & SIGN_BIT);
    store(out + i, sign & ~lanes_of(bits_at(equal, i)));
  }
  for (; i < m; ++i) {
    const bool tie = (equal[i / 8] >> (i % 8)) & 1, negative = (above[i / 8] >> (i % 8)) & 1;
    store(out + i, tie ? 0.0f : negative ? -1.0f : 1.0f);
  }
}

// sums += +-w for up to GROUP rows
FLCORE_INLINE void add_signs(const uint8_t* const* p, const float* w, int64_t rows, int64_t m,
                             float* sums) {
  int64_t i = 0;
  for (; i + LANES <= m; i += LANES) {
    vf32 sum = load<vf32>(sums + i);
    for (int64_t r = 0; r < rows; ++r) {
      const vu32 weight = (vu32)(vf32{} + w[r]);
      sum = sum + (vf32)(weight ^ (lanes_of(bits_at(p[r], i)) & SIGN_BIT));
    }
    store(sums + i, sum);
  }
  for (; i < m; ++i)
    for (int64_t r = 0; r < rows; ++r)
      sums[i] = sums[i] + ((p[r][i / 8] >> (i % 8)) & 1 ? -w[r] : w[r]);
}

// One bit a lane: whether it holds all ones.
FLCORE_INLINE uint32_t mask_of(const vi32& lanes) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)lanes);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)lanes));
#elif defined(__x86_64__)
  return uint32_t(_mm_movemask_ps((__m128)lanes));
#else
  uint32_t bits = 0;
  for (int k = 0; k < LANES; ++k) bits |= (uint32_t(lanes[k]) >> 31) << k;
  return bits;
#endif
}

// Bits of what is below zero and of what is zero, in words of 32.
void classify(const float* sums, int64_t m, uint8_t* below, uint8_t* zero) {
  for (int64_t i = 0; i < m; i += 32) {
    uint32_t b = 0, z = 0;
    for (int k = 0; k < 32; k += LANES) {
      const vf32 v = load<vf32>(sums + i + k);
      b |= mask_of(v < 0.0f) << k;
      z |= mask_of(v == 0.0f) << k;
    }
    store(below + i / 8, b);
    store(zero + i / 8, z);
  }
}

// ---- one tile
// ------------------------------------------------------------------------------------

// Calls use(pointers to GROUP rows, first row, rows) for the rows of a tile in order.
template <class Use>
FLCORE_INLINE void for_groups(const VoteArgs& a, const Workspace& w, int64_t begin, int64_t m,
                              const Use& use) {
  for (int64_t first = 0; first < a.n; first += GROUP) {
    const uint8_t* p[GROUP];
    const int64_t rows = a.n - first < GROUP ? a.n - first : GROUP;
    for (int64_t r = 0; r < GROUP; ++r)
      p[r] = r < rows ? open_row(a.rows[first + r], begin, m, w.rows + r * PAD) : w.zeros;
    use(p, first, rows);
  }
}

void count_tile(const VoteArgs& a, const Workspace& w, int64_t begin, int64_t m) {
  const int64_t planes = planes_of(a.n), bytes = (m + 7) / 8;
  __builtin_memset(w.planes, 0, size_t(planes * PAD));
  for_groups(a, w, begin, m, [&](const uint8_t* const* p, int64_t, int64_t) FLCORE_LAMBDA {
    int64_t i = 0;
    for (; i + VEC_BYTES <= bytes; i += VEC_BYTES)
      add_eight<true>(p, w.planes, planes, i, VEC_BYTES);
    if (i < bytes) add_eight<false>(p, w.planes, planes, i, bytes - i);
  });
  compare(w.planes, planes, a.n, bytes);
}

void sum_tile(const VoteArgs& a, const Workspace& w, int64_t begin, int64_t m) {
  __builtin_memset(w.sums, 0, size_t(4 * ((m + 31) / 32 * 32)));
  for_groups(a, w, begin, m,
             [&](const uint8_t* const* p, int64_t first, int64_t rows) FLCORE_LAMBDA {
               float weight[GROUP];
               for (int64_t r = 0; r < rows; ++r) weight[r] = float(a.rows[first + r].weight);
               if (rows == GROUP)
                 add_signs(p, weight, GROUP, m, w.sums);  // unrolled
               else
                 add_signs(p, weight, rows, m, w.sums);
             });
}

void tile(const VoteArgs& a, const Workspace& w, int64_t begin, int64_t m) {
  if (a.weighted || a.form == VOTE_SUM) {
    sum_tile(a, w, begin, m);
    if (a.form == VOTE_SUM) {
      __builtin_memcpy(static_cast<char*>(a.out) + 4 * begin, w.sums, size_t(4 * m));
      return;
    }
    classify(w.sums, m, w.planes, w.planes + PAD);
  } else {
    count_tile(a, w, begin, m);
  }
  if (a.form == VOTE_SIGNS)
    return write_signs(w.planes, w.planes + PAD, m, static_cast<float*>(a.out) + begin);
  if (m % 8) w.planes[m / 8] &= uint8_t((1 << (m % 8)) - 1);
  __builtin_memcpy(static_cast<uint8_t*>(a.out) + begin / 8, w.planes, size_t((m + 7) / 8));
}

void vote(const VoteArgs& a) {
  const int64_t tiles = (a.numel + 8 * TILE - 1) / (8 * TILE);
  for_ranges(tiles, a.threads, [&](int64_t thread, int64_t first, int64_t end) {
    const Workspace w = workspace(a, thread);
    __builtin_memset(w.zeros, 0, size_t(PAD));
    for (int64_t t = first; t < end; ++t) {
      const int64_t begin = t * 8 * TILE, rest = a.numel - begin;
      tile(a, w, begin, rest < 8 * TILE ? rest : 8 * TILE);
    }
  });
}

}  // namespace
}  // namespace FLCORE_ISA

extern const VoteFns FLCORE_TABLE(vote);
const VoteFns FLCORE_TABLE(vote) = {&FLCORE_ISA::vote, &FLCORE_ISA::scratch_bytes};

}  // namespace flcore
