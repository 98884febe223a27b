// Exact top-k with feedback, from gradient layers to a finished packet (csrc/sparsify.cpp).
#pragma once

#include <cstdint>

#include "api.h"
#include "wire.h"

namespace flcore {

// What goes on the wire. header: flags, round, seed, epoch and the three dtype and index codes.
struct SparsifyPacket {
  int64_t k;                    // 1 <= k <= numel, or 0 when numel is 0
  wire::Header header;
  const uint8_t* tensors;       // tensor_count rows of 64 bytes, or null
  int64_t tensor_count;
  uint8_t* out;                 // [out_bytes]
  int64_t out_bytes;            // what wire::plan says
};

// Writes the packet and updates the state. Returns false, with nothing written, when t or u is not
// finite anywhere.
bool sparsify(const SparsifyArgs& args, const SparsifyPacket& packet);

}  // namespace flcore
