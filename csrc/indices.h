// Section 4 of sparse packets whose indices are bitpacked or Rice-coded: sizes, bytes, checks.
#pragma once

#include <cstdint>
#include <vector>

#include "api.h"

namespace flcore {

// How the entries of a packet are written, found by looking at all of them.
struct IndexPlan {
  int coding = INDEX_RICE;          // INDEX_BITPACK | INDEX_RICE
  int64_t bytes = 0;                // of the section
  std::vector<uint8_t> parameters;  // as in IndexArgs
  std::vector<int64_t> groups, at;
};

// starts: [tiles + 1] first entry of each tile; local: [entries] increasing within a tile
IndexPlan plan_indices(int coding, int64_t numel, const int64_t* starts, const uint16_t* local,
                       int threads);

// out: [plan.bytes]
void write_indices(const IndexPlan& plan, int64_t numel, const int64_t* starts,
                   const uint16_t* local, int threads, uint8_t* out);

// Checks and decodes a section of any bytes; the starts were checked. Throws PacketError.
void read_indices(int coding, int64_t numel, const int64_t* starts, const uint8_t* section,
                  int64_t bytes, int threads, uint16_t* local);

}  // namespace flcore
