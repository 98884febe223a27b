// ChaCha20 keystream (RFC 8439, section 2.3) in groups of blocks, one block a 32-bit lane.
// A stream is a key and a nonce; its word i is word i & 15 of the block with counter i >> 4, read
// as little-endian. Integer arithmetic only: the same words at every level.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t CHACHA_GROUP = 16 * LANES;  // words of LANES consecutive blocks

template <int K>
FLCORE_INLINE vu32 rotate_left(const vu32& x) {
#if defined(__AVX512F__)
  return (vu32)_mm512_maskz_rol_epi32(__mmask16(0xffff), (__m512i)x, K);
#elif defined(__x86_64__)
  if constexpr (K == 16 || K == 8) {  // whole bytes move: one shuffle for three operations
#if defined(__AVX2__)
    const __m256i to = K == 16 ? _mm256_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12,
                                                  13, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15,
                                                  12, 13)
                               : _mm256_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13,
                                                  14, 3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12,
                                                  13, 14);
    return (vu32)_mm256_shuffle_epi8((__m256i)x, to);
#else
    const __m128i to =
        K == 16 ? _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
                : _mm_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
    return (vu32)_mm_shuffle_epi8((__m128i)x, to);
#endif
  }
  return (x << K) | (x >> (32 - K));
#else
  return (x << K) | (x >> (32 - K));
#endif
}

FLCORE_INLINE void quarter_round(vu32& a, vu32& b, vu32& c, vu32& d) {
  a += b;
  d = rotate_left<16>(d ^ a);
  c += d;
  b = rotate_left<12>(b ^ c);
  a += b;
  d = rotate_left<8>(d ^ a);
  c += d;
  b = rotate_left<7>(b ^ c);
}

// words[w] lane l = word w of block first + l (counters wrap; callers use no word past the last)
FLCORE_INLINE void chacha20_blocks(const MaskStream& s, uint32_t first, vu32 words[16]) {
  static const uint32_t constants[4] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
  vu32 counter = vu32{} + first;
  for (int l = 0; l < LANES; ++l) counter[l] += uint32_t(l);
  vu32 start[16];
  for (int w = 0; w < 4; ++w) start[w] = vu32{} + constants[w];
  for (int w = 0; w < 8; ++w) start[4 + w] = vu32{} + s.key[w];
  start[12] = counter;
  for (int w = 0; w < 3; ++w) start[13 + w] = vu32{} + s.nonce[w];
  vu32 x0 = start[0], x1 = start[1], x2 = start[2], x3 = start[3], x4 = start[4], x5 = start[5],
       x6 = start[6], x7 = start[7], x8 = start[8], x9 = start[9], x10 = start[10],
       x11 = start[11], x12 = start[12], x13 = start[13], x14 = start[14], x15 = start[15];
  for (int r = 0; r < 10; ++r) {
    quarter_round(x0, x4, x8, x12);
    quarter_round(x1, x5, x9, x13);
    quarter_round(x2, x6, x10, x14);
    quarter_round(x3, x7, x11, x15);
    quarter_round(x0, x5, x10, x15);
    quarter_round(x1, x6, x11, x12);
    quarter_round(x2, x7, x8, x13);
    quarter_round(x3, x4, x9, x14);
  }
  const vu32 x[16] = {x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15};
  for (int w = 0; w < 16; ++w) words[w] = x[w] + start[w];
}

// out[16 l + w] = words[w] lane l: from one block a lane to the order of the stream.
FLCORE_INLINE void store_blocks(const vu32 words[16], uint32_t* out) {
#if defined(__AVX512F__)
  __m512i row[4][4];  // [block in a 128-bit lane][words 4 q .. 4 q + 3]
  const __mmask16 all = 0xffff;  // the unmasked forms warn of undefined operands in gcc 12
  for (int q = 0; q < 4; ++q) {
    const __m512i a = (__m512i)words[4 * q], b = (__m512i)words[4 * q + 1],
                  c = (__m512i)words[4 * q + 2], d = (__m512i)words[4 * q + 3];
    const __m512i ab0 = _mm512_maskz_unpacklo_epi32(all, a, b);
    const __m512i ab1 = _mm512_maskz_unpackhi_epi32(all, a, b);
    const __m512i cd0 = _mm512_maskz_unpacklo_epi32(all, c, d);
    const __m512i cd1 = _mm512_maskz_unpackhi_epi32(all, c, d);
    row[0][q] = _mm512_maskz_unpacklo_epi64(0xff, ab0, cd0);
    row[1][q] = _mm512_maskz_unpackhi_epi64(0xff, ab0, cd0);
    row[2][q] = _mm512_maskz_unpacklo_epi64(0xff, ab1, cd1);
    row[3][q] = _mm512_maskz_unpackhi_epi64(0xff, ab1, cd1);
  }
  for (int k = 0; k < 4; ++k) {
    const __m512i low01 = _mm512_maskz_shuffle_i32x4(all, row[k][0], row[k][1], 0x44);
    const __m512i low23 = _mm512_maskz_shuffle_i32x4(all, row[k][2], row[k][3], 0x44);
    const __m512i high01 = _mm512_maskz_shuffle_i32x4(all, row[k][0], row[k][1], 0xee);
    const __m512i high23 = _mm512_maskz_shuffle_i32x4(all, row[k][2], row[k][3], 0xee);
    store(out + 16 * k, _mm512_maskz_shuffle_i32x4(all, low01, low23, 0x88));
    store(out + 16 * (4 + k), _mm512_maskz_shuffle_i32x4(all, low01, low23, 0xdd));
    store(out + 16 * (8 + k), _mm512_maskz_shuffle_i32x4(all, high01, high23, 0x88));
    store(out + 16 * (12 + k), _mm512_maskz_shuffle_i32x4(all, high01, high23, 0xdd));
  }
#elif defined(__AVX2__)
  __m256i row[4][4];
  for (int q = 0; q < 4; ++q) {
    const __m256i a = (__m256i)words[4 * q], b = (__m256i)words[4 * q + 1],
                  c = (__m256i)words[4 * q + 2], d = (__m256i)words[4 * q + 3];
    const __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
    const __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
    row[0][q] = _mm256_unpacklo_epi64(ab0, cd0);
    row[1][q] = _mm256_unpackhi_epi64(ab0, cd0);
    row[2][q] = _mm256_unpacklo_epi64(ab1, cd1);
    row[3][q] = _mm256_unpackhi_epi64(ab1, cd1);
  }
  for (int k = 0; k < 4; ++k) {
    for (int half = 0; half < 2; ++half) {
      const __m256i a = row[k][2 * half], b = row[k][2 * half + 1];
      store(out + 16 * k + 8 * half, _mm256_permute2x128_si256(a, b, 0x20));
      store(out + 16 * (4 + k) + 8 * half, _mm256_permute2x128_si256(a, b, 0x31));
    }
  }
#elif defined(__x86_64__)
  for (int q = 0; q < 4; ++q) {
    const __m128i a = (__m128i)words[4 * q], b = (__m128i)words[4 * q + 1],
                  c = (__m128i)words[4 * q + 2], d = (__m128i)words[4 * q + 3];
    const __m128i ab0 = _mm_unpacklo_epi32(a, b), ab1 = _mm_unpackhi_epi32(a, b);
    const __m128i cd0 = _mm_unpacklo_epi32(c, d), cd1 = _mm_unpackhi_epi32(c, d);
    store(out + 4 * q, _mm_unpacklo_epi64(ab0, cd0));
    store(out + 16 + 4 * q, _mm_unpackhi_epi64(ab0, cd0));
    store(out + 32 + 4 * q, _mm_unpacklo_epi64(ab1, cd1));
    store(out + 48 + 4 * q, _mm_unpackhi_epi64(ab1, cd1));
  }
#else
  for (int w = 0; w < 16; ++w)
    for (int l = 0; l < LANES; ++l) out[16 * l + w] = words[w][l];
#endif
}

// out[j] = sum_s +- word CHACHA_GROUP g + j of stream s, modulo 2^32
FLCORE_INLINE void masks_of_group(const MaskSet& set, int64_t g, uint32_t* out) {
  const uint32_t first = uint32_t(g * LANES);
  vu32 net[16] = {};
  if (set.count == 1 && !set.streams[0].negative) {  // the keystream itself: nothing to sum
    chacha20_blocks(set.streams[0], first, net);
    store_blocks(net, out);
    return;
  }
  for (int64_t s = 0; s < set.count; ++s) {
    vu32 words[16];
    chacha20_blocks(set.streams[s], first, words);
    const vu32 flip = vu32{} - uint32_t(set.streams[s].negative);  // -x = (x ^ ones) - ones
    for (int w = 0; w < 16; ++w) net[w] += (words[w] ^ flip) - flip;
  }
  store_blocks(net, out);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
