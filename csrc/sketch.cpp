// Exact top-k of estimates that are never written: radix selection on the 31-bit key of |estimate| as
// in csrc/sparsify.cpp. A histogram of the first digit a tile says in which bin the k-th key lies; when
// few keys lie from that bin up they are collected, else the next digit is counted. Every pass makes
// the estimates anew: two passes of rows gathers a coordinate for all but degenerate tables.
#include "sketch.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

namespace flcore {
namespace {

constexpr int64_t CANDIDATE_SLACK = 4096;

uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffffu;
}

}  // namespace

void sketch_top_k(const SketchTable& table, int64_t k, int64_t* index, float* values) {
  if (k == 0) return;
  const SketchFns& run = *cpu().sketch;
  const size_t tiles = size_t((table.numel + SPARSE_TILE - 1) / SPARSE_TILE);
  std::vector<uint32_t> counts(tiles * SPARSIFY_BINS);
  std::vector<int64_t> above(tiles, 0), within(tiles), starts(tiles + 1, 0);
  int64_t need = k, found;
  uint32_t prefix = 0;
  int level = 0;
  do {
    run.histogram(table, level, prefix, counts.data());
    int64_t totals[SPARSIFY_BINS] = {};
    for (size_t i = 0; i < counts.size(); ++i) totals[i % SPARSIFY_BINS] += counts[i];
    int bin = SPARSIFY_BINS - 1;
    for (; totals[bin] < need; --bin) need -= totals[bin];
    found = 0;
    for (size_t t = 0; t < tiles; ++t) {
      const uint32_t* row = &counts[t * SPARSIFY_BINS];
      for (int b = bin + 1; b < SPARSIFY_BINS; ++b) above[t] += row[b];
      within[t] = row[bin];
      found += above[t] + within[t];
    }
    prefix = (prefix << SPARSIFY_WIDTH[level]) | uint32_t(bin);
    ++level;
  } while (level < SPARSIFY_LEVELS && found > 2 * k + CANDIDATE_SLACK);
  const uint32_t cut = prefix << SPARSIFY_SHIFT[level - 1];
  if (level == SPARSIFY_LEVELS)  // keys equal to the k-th: those of the first tiles
    for (int64_t& tie : within) {
      tie = std::min(tie, need);
      need -= tie;
    }
  for (size_t t = 0; t < tiles; ++t) starts[t + 1] = starts[t] + above[t] + within[t];

  std::vector<int64_t> where(static_cast<size_t>(starts[tiles]));
  std::vector<float> what(where.size());
  run.collect(table, cut, within.data(), starts.data(), where.data(), what.data());
  std::vector<uint32_t> keys(where.size());
  std::transform(what.begin(), what.end(), keys.begin(), key_of);
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<uint32_t>());
  const uint32_t tau = keys[size_t(k - 1)];
  int64_t ties = k - std::count_if(what.begin(), what.end(),
                                   [&](float x) { return key_of(x) > tau; });
  int64_t at = 0;
  for (size_t i = 0; i < where.size(); ++i) {
    const uint32_t key = key_of(what[i]);
    if (key < tau || (key == tau && ties-- <= 0)) continue;
    index[at] = where[i];
    values[at++] = what[i];
  }
}

}  // namespace flcore
