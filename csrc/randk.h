// Random-k: the coordinates that belong to a seed and a round, and packets of an update at them.
#pragma once

#include <cstdint>
#include <vector>

#include "api.h"
#include "sparse_emit.h"

namespace flcore {

// Coordinates of a sparse packet by tile.
struct Support {
  std::vector<int64_t> starts;   // [tiles + 1] first entry of each tile
  std::vector<uint16_t> local;   // [entries] index in the tile, increasing
};

// k of numel coordinates, 0 <= k <= numel <= 2^48; memory: 10 bytes for each of min(k, numel - k)
// and 24 for each tile.
Support random_support(int64_t numel, int64_t k, uint64_t seed, uint64_t round, int threads);

// scale * u at the k coordinates that seed and round of the packet's header give, and the new state.
// `check`: some state is updated in place. Returns the bytes of the packet, or -1 when a value is not
// finite; new state outside of the old one's memory is then void, and nothing else has changed.
int64_t randk(const FeedbackArgs& feedback, int64_t k, float scale, bool check,
              const SparsePacket& packet);

}  // namespace flcore
