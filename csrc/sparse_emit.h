// From selected entries to a finished packet: the last step of every codec that sends coordinates.
#pragma once

#include <cstdint>

#include "api.h"
#include "wire.h"

namespace flcore {

// Which index coding a packet gets; of equally short ones the first of tile16, bitmask, bitpack, Rice.
enum IndexChoice : int {
  INDEX_GIVEN = 0,    // that of the header
  INDEX_AUTO = 1,     // tile16 or bitmask
  INDEX_SMALLEST = 2  // whichever takes the fewest bytes
};

// What goes on the wire besides the entries, and where it goes.
struct SparsePacket {
  wire::Header header;     // flags, round, seed, epoch, dtype and index codes; numel is filled in
  const uint8_t* tensors;  // tensor_count rows of 64 bytes, or null
  int64_t tensor_count;
  uint8_t* out;
  int64_t capacity;        // bytes; at least those of the packet
  IndexChoice choice = INDEX_GIVEN;
};

// Writes the packet and corrects the new state at the entries: e <- t - D, h <- h + D, and v <- 0
// where it is masked and D is not 0, with D what a receiver decodes. The dense part of the new state
// (e <- t, v <- s) must have been written; h changes in place, here alone. Returns the bytes of the
// packet. Throws, with h untouched, when it does not fit.
int64_t sparse_emit(const FeedbackArgs& feedback, const SparseEntries& entries,
                    const SparsePacket& packet);

// What another memory has already encoded: values as on the wire, and a float32 scale a tile for int8.
struct SparseSections {
  int64_t numel;
  const int64_t* starts;   // [tiles + 1] first entry of each tile
  const uint16_t* local;   // [entries]
  const uint8_t* values;
  const uint8_t* scales;   // null except for int8
  int threads;
};

// Writes the packet of encoded entries; returns its bytes. Throws when it does not fit.
int64_t sparse_pack(const SparseSections& sections, const SparsePacket& packet);

}  // namespace flcore
