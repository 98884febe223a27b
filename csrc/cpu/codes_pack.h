// Codes of 1 to 8 bits, one a byte, to and from the wire: code j of a bucket occupies the bits
// [j b, j b + b) of its bytes, least significant first; the bits after the last code are zero.
// Eight codes are b bytes, put together in a 64-bit word; 1, 2 and 4 bits go 16 codes at a time.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

// Eight codes, one a byte, in the low 8 b bits, and back: halves, then pairs, then neighbours move
// together. 1 <= BITS <= 7.
template <int BITS>
FLCORE_INLINE uint64_t join_codes(uint64_t x) {
  constexpr uint64_t BYTE = 0x00ff00ff00ff00ffull, WORD = 0x0000ffff0000ffffull,
                     HALF = 0x00000000ffffffffull;
  x = (x & BYTE) | ((x & ~BYTE) >> (8 - BITS));
  x = (x & WORD) | ((x & ~WORD) >> (16 - 2 * BITS));
  return (x & HALF) | ((x & ~HALF) >> (32 - 4 * BITS));
}
template <int BITS>
FLCORE_INLINE uint64_t split_codes(uint64_t x) {
  constexpr uint64_t ONE = (1u << BITS) - 1, TWO = (1u << (2 * BITS)) - 1,
                     FOUR = (uint64_t(1) << (4 * BITS)) - 1;
  x = (x & FOUR) | ((x >> (4 * BITS)) << 32);
  x = (x & (TWO | TWO << 32)) | ((x << (16 - 2 * BITS)) & ((TWO | TWO << 32) << 16));
  constexpr uint64_t LOW = ONE | ONE << 16 | ONE << 32 | ONE << 48;
  return (x & LOW) | ((x << (8 - BITS)) & (LOW << 8));
}

// BYTES bytes, low ones first, in pieces of 1, 2 and 4: through memory of another width a word would
// wait for the store before it.
template <int BYTES>
FLCORE_INLINE uint64_t load_bytes(const uint8_t* p) {
  uint64_t x = 0;
  if constexpr (BYTES & 4) x = load<uint32_t>(p);
  if constexpr (BYTES & 2) x |= uint64_t(load<uint16_t>(p + (BYTES & 4))) << (8 * (BYTES & 4));
  if constexpr (BYTES & 1) x |= uint64_t(p[BYTES & 6]) << (8 * (BYTES & 6));
  return x;
}
template <int BYTES>
FLCORE_INLINE void store_bytes(uint8_t* p, uint64_t x) {
  if constexpr (BYTES & 4) store(p, uint32_t(x));
  if constexpr (BYTES & 2) store(p + (BYTES & 4), uint16_t(x >> (8 * (BYTES & 4))));
  if constexpr (BYTES & 1) p[BYTES & 6] = uint8_t(x >> (8 * (BYTES & 6)));
}

#if defined(__SSSE3__)
// 16 codes of 1, 2 or 4 bits
template <int BITS>
FLCORE_INLINE void pack_sixteen(const uint8_t* codes, uint8_t* out) {
  const __m128i x = load<__m128i>(codes);
  if constexpr (BITS == 1) {
    store(out, uint16_t(_mm_movemask_epi8(_mm_slli_epi16(x, 7))));
  } else if constexpr (BITS == 2) {
    const __m128i pairs = _mm_maddubs_epi16(x, _mm_set1_epi16(0x0401));
    const __m128i fours = _mm_madd_epi16(pairs, _mm_set1_epi32(0x00100001));
    const __m128i bytes = _mm_shuffle_epi8(fours, _mm_set1_epi32(0x0c080400));
    store(out, uint32_t(_mm_cvtsi128_si32(bytes)));
  } else {
    const __m128i pairs = _mm_maddubs_epi16(x, _mm_set1_epi16(0x1001));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(pairs, pairs));
  }
}
template <int BITS>
FLCORE_INLINE void unpack_sixteen(const uint8_t* in, uint8_t* codes) {
  if constexpr (BITS == 1) {
    const __m128i x = _mm_cvtsi32_si128(load<uint16_t>(in));
    const __m128i each = _mm_shuffle_epi8(x, _mm_set_epi64x(0x0101010101010101, 0));
    const __m128i bit = _mm_set1_epi64x(int64_t(0x8040201008040201u));
    const __m128i set = _mm_cmpeq_epi8(_mm_and_si128(each, bit), bit);
    store(codes, _mm_and_si128(set, _mm_set1_epi8(1)));
  } else if constexpr (BITS == 2) {
    const __m128i x = _mm_shuffle_epi8(_mm_cvtsi32_si128(load<int32_t>(in)),
                                       _mm_set_epi32(0x03030303, 0x02020202, 0x01010101, 0));
    // byte k keeps the two bits it wants and brings them down: x, x / 4, x / 16, x / 64
    const __m128i even = _mm_and_si128(x, _mm_set1_epi32(0x00300003));
    const __m128i odd = _mm_and_si128(x, _mm_set1_epi32(int32_t(0xc0000c00u)));
    const __m128i a = _mm_or_si128(_mm_and_si128(even, _mm_set1_epi32(0x3)),
                                   _mm_srli_epi32(_mm_and_si128(even, _mm_set1_epi32(0x300000)), 4));
    const __m128i b =
        _mm_or_si128(_mm_srli_epi32(_mm_and_si128(odd, _mm_set1_epi32(0xc00)), 2),
                     _mm_srli_epi32(_mm_and_si128(odd, _mm_set1_epi32(int32_t(0xc0000000u))), 6));
    store(codes, _mm_or_si128(a, b));
  } else {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in));
    const __m128i low = _mm_and_si128(x, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(x, 4), _mm_set1_epi8(15));
    store(codes, _mm_unpacklo_epi8(low, high));
  }
}
constexpr bool PACK_SIXTEEN = true;
#else
template <int BITS>
FLCORE_INLINE void pack_sixteen(const uint8_t*, uint8_t*) {}
template <int BITS>
FLCORE_INLINE void unpack_sixteen(const uint8_t*, uint8_t*) {}
constexpr bool PACK_SIXTEEN = false;
#endif

template <int BITS>
static void pack_codes(const uint8_t* codes, int64_t n, uint8_t* out) {
  int64_t i = 0;
  if constexpr (PACK_SIXTEEN && (BITS == 1 || BITS == 2 || BITS == 4))
    for (; i + 16 <= n; i += 16, out += 2 * BITS) pack_sixteen<BITS>(codes + i, out);
  for (; i + 8 <= n; i += 8, out += BITS)
    store_bytes<BITS>(out, join_codes<BITS>(load<uint64_t>(codes + i)));
  if (i == n) return;
  uint64_t x = 0;
  __builtin_memcpy(&x, codes + i, size_t(n - i));
  x = join_codes<BITS>(x);
  __builtin_memcpy(out, &x, size_t(((n - i) * BITS + 7) / 8));
}

template <int BITS>
static void unpack_codes(const uint8_t* in, int64_t n, uint8_t* codes) {
  int64_t i = 0;
  if constexpr (PACK_SIXTEEN && (BITS == 1 || BITS == 2 || BITS == 4))
    for (; i + 16 <= n; i += 16, in += 2 * BITS) unpack_sixteen<BITS>(in, codes + i);
  for (; i + 8 <= n; i += 8, in += BITS)
    store(codes + i, split_codes<BITS>(load_bytes<BITS>(in)));
  if (i == n) return;
  uint64_t x = 0;
  __builtin_memcpy(&x, in, size_t(((n - i) * BITS + 7) / 8));
  x = split_codes<BITS>(x);
  __builtin_memcpy(codes + i, &x, size_t(n - i));
}

// n codes, one a byte and below 2^bits, into ceil(n bits / 8) bytes; the two do not overlap
static inline void pack_codes(int bits, const uint8_t* codes, int64_t n, uint8_t* out) {
  switch (bits) {
    case 1: return pack_codes<1>(codes, n, out);
    case 2: return pack_codes<2>(codes, n, out);
    case 3: return pack_codes<3>(codes, n, out);
    case 4: return pack_codes<4>(codes, n, out);
    case 5: return pack_codes<5>(codes, n, out);
    case 6: return pack_codes<6>(codes, n, out);
    case 7: return pack_codes<7>(codes, n, out);
    default: __builtin_memcpy(out, codes, size_t(n));
  }
}

// The inverse; reads ceil(n bits / 8) bytes and writes n.
static inline void unpack_codes(int bits, const uint8_t* in, int64_t n, uint8_t* codes) {
  switch (bits) {
    case 1: return unpack_codes<1>(in, n, codes);
    case 2: return unpack_codes<2>(in, n, codes);
    case 3: return unpack_codes<3>(in, n, codes);
    case 4: return unpack_codes<4>(in, n, codes);
    case 5: return unpack_codes<5>(in, n, codes);
    case 6: return unpack_codes<6>(in, n, codes);
    case 7: return unpack_codes<7>(in, n, codes);
    default: __builtin_memcpy(codes, in, size_t(n));
  }
}

// Five trits a byte, the first the least significant: ceil(n / 5) bytes.
static inline void pack_trits(const uint8_t* trits, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + 5 <= n; i += 5, ++out)
    *out = uint8_t(trits[i] + 3 * trits[i + 1] + 9 * trits[i + 2] + 27 * trits[i + 3] +
                   81 * trits[i + 4]);
  if (i == n) return;
  int byte = 0;
  for (int64_t k = n; k > i; --k) byte = 3 * byte + trits[k - 1];
  *out = uint8_t(byte);
}

struct TritTable {
  uint64_t at[256];  // the five trits of a byte, one a byte, and three bytes of 0
};
constexpr TritTable make_trit_table() {
  TritTable table{};
  for (int byte = 0; byte < 256; ++byte)
    for (int k = 0, rest = byte; k < 5; ++k, rest /= 3)
      table.at[byte] |= uint64_t(rest % 3) << (8 * k);
  return table;
}
constexpr TritTable TRITS = make_trit_table();

// The n trits that follow the first `skip` begin at trits + skip % 5; what is written ends less than
// 16 bytes after the last of them.
static inline void unpack_trits(const uint8_t* in, int64_t skip, int64_t n, uint8_t* trits) {
  in += skip / 5;
  for (int64_t i = 0; i < n + skip % 5; i += 5) store(trits + i, TRITS.at[*in++]);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
