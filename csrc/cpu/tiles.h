// Layers cut into tiles of a few thousand coordinates: the unit of work of element-wise kernels.
#pragma once

#include <cstdint>

#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/layers.h"

namespace flcore {
namespace FLCORE_ISA {

// Calls body(layer, offset, length) for each tile of each layer; size(l) coordinates make a tile of
// layer l, and `first` [layers + 1] receives the number of each layer's first tile.
template <class TileOf, class Body>
static void for_tiles(int64_t layers, const int64_t* numel, int64_t* first, int threads,
                      const TileOf& size, const Body& body) {
  first[0] = 0;
  for (int64_t l = 0; l < layers; ++l)
    first[l + 1] = first[l] + (numel[l] + size(l) - 1) / size(l);
  for_chunks(first[layers], threads, [&](int64_t tile) {
    const int64_t l = find_layer(first, layers, tile);
    const int64_t offset = (tile - first[l]) * size(l), rest = numel[l] - offset;
    body(l, offset, rest < size(l) ? rest : size(l));
  });
}

}  // namespace FLCORE_ISA
}  // namespace flcore
