// Images of the permutation are sorted by tile with counting: count, place, order each tile.
#include "randk.h"

#include <algorithm>
#include <memory>

#include "check.h"

namespace flcore {
namespace {

constexpr int64_t BATCH = 64;  // chunks at a time: 2 MiB of images
constexpr int64_t ALONE = 1 << 19;  // fewer coordinates are drawn before a team of threads is awake

PermuteArgs permutation(int64_t numel, uint64_t seed, uint64_t round) {
  PermuteArgs x;
  x.numel = numel;
  int bits = PERMUTE_BITS_MIN;
  while ((int64_t(1) << bits) < numel) ++bits;
  x.left = bits / 2;
  x.right = bits - x.left;
  const PhiloxStream stream = philox_stream(seed, uint32_t(round), STREAM_RAND_K, 0);
  for (int i = 0; i < 2 * PERMUTE_ROUNDS; i += 4) {
    const PhiloxBlock block = philox_block(stream, uint32_t(i / 4));
    for (int w = 0; w < 4; ++w) x.keys[i + w] = block.w[w];
  }
  return x;
}

// The first k images below numel.
std::vector<uint64_t> images_of(const PermuteArgs& x, int64_t k, int threads) {
  std::vector<uint64_t> found;
  found.reserve(size_t(k));
  const int64_t pieces = std::min(BATCH, (2 * k + 2 * PERMUTE_CHUNK) / PERMUTE_CHUNK);
  std::vector<uint64_t> images(size_t(pieces * PERMUTE_CHUNK));
  std::vector<int64_t> counts(size_t(pieces), 0);
  for (int64_t first = 0; int64_t(found.size()) < k; first += pieces * PERMUTE_CHUNK) {
    cpu().randk->permute(x, first, pieces, images.data(), counts.data(), threads);
    for (int64_t c = 0; c < pieces; ++c) {
      const int64_t take = std::min(counts[size_t(c)], k - int64_t(found.size()));
      const auto from = images.begin() + c * PERMUTE_CHUNK;
      found.insert(found.end(), from, from + take);
    }
  }
  return found;
}

}  // namespace

Support random_support(int64_t numel, int64_t k, uint64_t seed, uint64_t round, int threads) {
  const int64_t tiles = wire::tiles(numel);
  const bool others = 2 * k > numel;  // fewer coordinates are left out than kept
  const int64_t drawn = others ? numel - k : k;
  if (drawn < ALONE) threads = 1;
  const auto images = images_of(permutation(numel, seed, round), drawn, threads);
  std::vector<int64_t> starts(size_t(tiles) + 1, 0);
  for (uint64_t image : images) ++starts[size_t(image / SPARSE_TILE) + 1];
  for (size_t t = 0; t < size_t(tiles); ++t) starts[t + 1] += starts[t];
  std::vector<int64_t> at(starts);
  const std::unique_ptr<uint16_t[]> placed(new uint16_t[size_t(drawn)]);
  for (uint64_t image : images)
    placed[size_t(at[size_t(image / SPARSE_TILE)]++)] = uint16_t(image % SPARSE_TILE);

  Support support;
  support.starts = starts;
  if (others)
    for (int64_t t = 0; t <= tiles; ++t)
      support.starts[size_t(t)] = std::min(t * SPARSE_TILE, numel) - starts[size_t(t)];
  support.local.resize(size_t(k));
  cpu().randk->order(numel, starts.data(), placed.get(), support.starts.data(),
                     support.local.data(), others, threads);
  return support;
}

int64_t randk(const FeedbackArgs& feedback, int64_t k, float scale, bool check,
              const SparsePacket& packet) {
  FLCORE_CHECK(k <= feedback.numel && k >= (feedback.numel > 0), "k: expected 1 to ",
               feedback.numel, ", got ", k);
  const Support support = random_support(feedback.numel, k, packet.header.seed,
                                         packet.header.round, feedback.threads);
  const std::unique_ptr<float[]> u(new float[size_t(k)]), t(new float[feedback.e ? size_t(k) : 0]);
  const SparseEntries entries{support.starts.data(), support.local.data(), u.get(),
                              feedback.e ? t.get() : nullptr};
  const GatherArgs gather{feedback, entries.starts, entries.local, scale,
                          check,    u.get(),        feedback.e ? t.get() : nullptr};
  if (!cpu().randk->gather(gather)) return -1;
  SparsePacket seeded = packet;
  seeded.header.index = INDEX_SEEDED;
  return sparse_emit(feedback, entries, seeded);
}

}  // namespace flcore
