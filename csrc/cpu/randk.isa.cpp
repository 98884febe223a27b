// Random-k: coordinates that follow from a seed, and what an update holds there.
//   P(j)    a permutation of [0, 2^(left + right)): a Feistel network of PERMUTE_ROUNDS rounds, whose
//           halves take turns; half ^= F(other half) with F two multiplications keyed by 64 bits
//   support the first k of P(0), P(1), P(2), .. that are below d, sorted
//   gather  t and u (cpu/feedback.h) at those coordinates, and e <- t, v <- s everywhere
// A permutation restricted to part of its range is one again, so the k coordinates are distinct and
// every k-subset is as likely as another, as far as the network mixes. P takes 3 ns a coordinate on
// one core. gather reads g and the states once (twice where they are updated in place) and writes the
// dense ones: 16 B a coordinate with e, 20 with e and h. Integers and element-wise float32: the same
// bits at every level and thread count. Source: specs topk-sparsification (4), wire-format; Black and
// Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/feedback.h"
#include "cpu/layers.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t BLOCK = 1024;

// ---- permutation ------------------------------------------------------------------------------

FLCORE_INLINE vu32 mixed(const vu32& x, uint32_t a, uint32_t b) {
  vu32 y = (x ^ a) * 0x9E3779B1u;
  y = ((y ^ (y >> 15)) + b) * 0x85EBCA77u;
  return y ^ (y >> 16);
}

// Images below numel of j in [first, first + PERMUTE_CHUNK), in the order of j; returns how many.
static int64_t permute_chunk(const PermuteArgs& x, int64_t first, uint64_t* images) {
  const uint32_t left_mask = (1u << x.left) - 1u, right_mask = (1u << x.right) - 1u;
  const int64_t range = int64_t(1) << (x.left + x.right);
  const int64_t last = first + PERMUTE_CHUNK < range ? first + PERMUTE_CHUNK : range;
  vu32 lanes;
  for (int k = 0; k < LANES; ++k) lanes[k] = uint32_t(k);
  int64_t found = 0;
  for (int64_t j = first; j < last; j += LANES) {  // right >= 4 bits: no lane carries into l
    vu32 l = vu32{} + uint32_t(j >> x.right);
    vu32 r = lanes + (uint32_t(j) & right_mask);
    for (int round = 0; round < PERMUTE_ROUNDS; round += 2) {
      l ^= mixed(r, x.keys[2 * round], x.keys[2 * round + 1]) & left_mask;
      r ^= mixed(l, x.keys[2 * round + 2], x.keys[2 * round + 3]) & right_mask;
    }
    for (int k = 0; k < LANES; ++k) {
      const uint64_t image = uint64_t(l[k]) << x.right | r[k];
      images[found] = image;
      found += image < uint64_t(x.numel);
    }
  }
  return found;
}

void permute(const PermuteArgs& x, int64_t first, int64_t chunks, uint64_t* images,
             int64_t* counts, int threads) {
  for_chunks(chunks, threads, [&](int64_t c) {
    counts[c] = permute_chunk(x, first + c * PERMUTE_CHUNK, images + c * PERMUTE_CHUNK);
  });
}

// ---- order ------------------------------------------------------------------------------------

// Sorts distinct local indices by way of a bitmap; with `others`, writes those that are not given.
static void order_tile(const uint16_t* in, int64_t count, int64_t length, bool others,
                       uint16_t* out) {
  uint64_t bits[SPARSE_TILE / 64];
  const int64_t words = (length + 63) / 64;
  __builtin_memset(bits, 0, size_t(8 * words));
  for (int64_t j = 0; j < count; ++j) bits[in[j] >> 6] |= uint64_t(1) << (in[j] & 63);
  for (int64_t w = 0; w < words; ++w) {
    uint64_t word = others ? ~bits[w] : bits[w];
    if (others && w == words - 1 && (length & 63)) word &= (uint64_t(1) << (length & 63)) - 1;
    for (; word; word &= word - 1) *out++ = uint16_t(64 * w + __builtin_ctzll(word));
  }
}

void order(int64_t numel, const int64_t* in_starts, const uint16_t* in, const int64_t* out_starts,
           uint16_t* out, bool others, int threads) {
  for_chunks((numel + SPARSE_TILE - 1) / SPARSE_TILE, threads, [&](int64_t t) {
    const int64_t left = numel - t * SPARSE_TILE;
    order_tile(in + in_starts[t], in_starts[t + 1] - in_starts[t],
               left < SPARSE_TILE ? left : SPARSE_TILE, others, out + out_starts[t]);
  });
}

// ---- gather -----------------------------------------------------------------------------------

// False when a value of the tile is not finite.
static bool gather_tile(const GatherArgs& x, int64_t tile, bool write) {
  const FeedbackArgs& f = x.feedback;
  alignas(64) float memory[FEEDBACK_PARTS * BLOCK];
  const FeedbackBuffers buffers = feedback_buffers(memory, BLOCK);
  const int64_t begin = tile * SPARSE_TILE;
  const int64_t end = begin + SPARSE_TILE < f.numel ? begin + SPARSE_TILE : f.numel;
  int64_t layer = find_layer(f.starts, f.layers, begin), j = x.starts[tile];
  bool finite = true;
  for (int64_t at = begin; at < end && finite; at += BLOCK) {
    const int64_t count = at + BLOCK < end ? BLOCK : end - at;
    const FeedbackBlock block = feedback_load(f, at, count, layer, buffers);
    const int64_t off = at - begin;
    float top = 0;  // a scaled value may overflow
    for (; j < x.starts[tile + 1] && x.local[j] < off + count; ++j) {
      const float u = load<float>(block.u + (x.local[j] - off)) * x.scale;
      top = u > top ? u : -u > top ? -u : top;
      x.u[j] = u;
      if (x.t) x.t[j] = load<float>(block.t + (x.local[j] - off));
    }
    finite = block.finite && bits_of(top) < 0x7f800000u;
    if (write) feedback_store(f, at, count, block, nullptr, buffers.u);
  }
  feedback_fence();
  return finite;
}

static bool gather_all(const GatherArgs& x, bool write) {
  int32_t bad = 0;
  for_chunks((x.feedback.numel + SPARSE_TILE - 1) / SPARSE_TILE, x.feedback.threads,
             [&](int64_t t) {
               if (!gather_tile(x, t, write)) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
             });
  return bad == 0;
}

bool gather(const GatherArgs& x) {
  return (!x.check || gather_all(x, false)) && gather_all(x, true);
}

}  // namespace
}  // namespace FLCORE_ISA

extern const RandkFns FLCORE_TABLE(randk);
const RandkFns FLCORE_TABLE(randk) = {&FLCORE_ISA::permute, &FLCORE_ISA::order,
                                      &FLCORE_ISA::gather};

}  // namespace flcore
