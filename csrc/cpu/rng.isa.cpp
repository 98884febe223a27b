// Stretches of Philox4x32-10 streams: random bits, uniforms and normals (layout in philox.h).
//   bits:    out[j] = element offset + j of the stream, uint32
//   uniform: out[j] = (bits >> 8) 2^-24, float32 in [0, 1)
//   normal:  out[j], out[j + 1] = Box-Muller of their two words, float32 (box_muller.h)
// Writes 4 bytes a value, reads nothing. Integer arithmetic, and float32 operations that are rounded
// one by one, so every instruction set, thread count and chunk size gives the same bits.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/normal.h"
#include "cpu/philox_bits.h"
#include "philox.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t CHUNK = 1 << 15;  // values one thread takes at a time

struct Uniform {
  FLCORE_INLINE uint32_t of(uint32_t bits) { return bits_of(philox_uniform(bits)); }
};

// part(first position in the stream, first value of out, how many)
template <class Part>
static void chunks(const RngArgs& a, const Part& part) {
  for_chunks((a.numel + CHUNK - 1) / CHUNK, a.threads, [&](int64_t c) {
    const int64_t begin = c * CHUNK;
    part(a.offset + begin, begin, a.numel - begin < CHUNK ? a.numel - begin : CHUNK);
  });
}

template <class Form>
static void fill(const RngArgs& a) {
  uint32_t* out = static_cast<uint32_t*>(a.out);  // a float is written as its bits
  chunks(a, [&](int64_t i, int64_t j, int64_t count) {
    philox_fill<Form>(a.stream, i, count, out + j);
  });
}

static void normal(const RngArgs& a) {
  float* out = static_cast<float*>(a.out);
  chunks(a, [&](int64_t i, int64_t j, int64_t count) { normal_tile(a.stream, i, out + j, count); });
}

}  // namespace FLCORE_ISA

extern const RngFns FLCORE_TABLE(rng);
const RngFns FLCORE_TABLE(rng) = {&FLCORE_ISA::fill<FLCORE_ISA::PhiloxRaw>,
                                  &FLCORE_ISA::fill<FLCORE_ISA::Uniform>,
                                  &FLCORE_ISA::normal};

}  // namespace flcore
