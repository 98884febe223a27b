// Stretches of Philox4x32-10 streams: random bits and uniforms (layout in philox.h).
//   bits:    out[j] = element offset + j of the stream, uint32
//   uniform: out[j] = (bits >> 8) 2^-24, float32 in [0, 1)
// Writes 4 bytes a value, reads nothing. Integer arithmetic and one exact scaling, so every
// instruction set, thread count and chunk size gives the same bits.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/vec.h"
#include "philox.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t CHUNK = 1 << 15;  // values one thread takes at a time

// One 32-bit word a 64-bit lane, in its low half; the high half may hold anything, because the
// multiply does not read it. So a round needs no masks and no blends.
typedef uint64_t Words __attribute__((vector_size(VEC_BYTES)));
constexpr int GROUP = LANES64;  // Philox blocks side by side

FLCORE_INLINE Words splat(uint32_t x) { return Words{} + x; }

FLCORE_INLINE Words multiply(const Words& a, const Words& b) {  // low halves, 32 x 32 -> 64
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// GROUP consecutive blocks; two 32-bit words a lane of `low` (words 0, 1) and `high` (words 2, 3).
FLCORE_INLINE void blocks(const PhiloxStream& s, uint32_t first, Words& low, Words& high) {
  Words c0 = splat(first), c1 = splat(s.tensor), c2 = splat(s.round), c3 = splat(s.client);
  for (int l = 0; l < GROUP; ++l) c0[l] += uint64_t(l);
  PhiloxKey key = {s.k0, s.k1};
  for (int r = 0; r < PHILOX_ROUNDS; ++r, philox_bump(key)) {
    const Words p0 = multiply(c0, splat(PHILOX_M0)), p1 = multiply(c2, splat(PHILOX_M1));
    c0 = (p1 >> 32) ^ c1 ^ splat(key.k0);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ splat(key.k1);
    c3 = p0;
  }
  low = (c0 & 0xffffffffu) | (c1 << 32);
  high = (c2 & 0xffffffffu) | (c3 << 32);
}

struct Bits {
  FLCORE_INLINE uint32_t of(uint32_t bits) { return bits; }
};
struct Uniform {
  FLCORE_INLINE uint32_t of(uint32_t bits) { return bits_of(philox_uniform(bits)); }
};

template <class Form>
static void fill(const RngArgs& a) {
  uint32_t* out = static_cast<uint32_t*>(a.out);  // a float is written as its bits
  for_chunks((a.numel + CHUNK - 1) / CHUNK, a.threads, [&](int64_t c) {
    const int64_t end = (c + 1) * CHUNK < a.numel ? (c + 1) * CHUNK : a.numel;
    int64_t j = c * CHUNK;
    while (j < end) {
      const int64_t i = a.offset + j;  // position in the stream
      if ((i & 3) == 0 && j + 4 * GROUP <= end) {
        Words low, high;
        blocks(a.stream, uint32_t(i >> 2), low, high);
        uint64_t pairs[2 * GROUP];
        for (int l = 0; l < GROUP; ++l) {
          pairs[2 * l] = low[l];
          pairs[2 * l + 1] = high[l];
        }
        uint32_t bits[4 * GROUP];
        __builtin_memcpy(bits, pairs, sizeof bits);
        for (int k = 0; k < 4 * GROUP; ++k) bits[k] = Form::of(bits[k]);
        __builtin_memcpy(out + j, bits, sizeof bits);
        j += 4 * GROUP;
        continue;
      }
      const PhiloxBlock b = philox_block(a.stream, uint32_t(i >> 2));
      for (int k = int(i & 3); k < 4 && j < end; ++k, ++j) out[j] = Form::of(b.w[k]);
    }
  });
}

}  // namespace FLCORE_ISA

extern const RngFns FLCORE_TABLE(rng);
const RngFns FLCORE_TABLE(rng) = {&FLCORE_ISA::fill<FLCORE_ISA::Bits>,
                                  &FLCORE_ISA::fill<FLCORE_ISA::Uniform>};

}  // namespace flcore
