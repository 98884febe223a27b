// Exact top-k with feedback, from gradient layers to a finished packet (csrc/sparsify.cpp).
#pragma once

#include <cstdint>

#include "api.h"
#include "sparse_emit.h"

namespace flcore {

// Which entries are kept: of each segment the k of largest key, smaller index first among equals,
// as far as their keys reach `floor`.
struct Selection {
  int64_t segments;
  const int64_t* starts;  // [segments + 1] first coordinate of each segment, then numel
  const int64_t* k;       // [segments] 1 <= k <= coordinates of the segment, 0 for an empty one
  uint32_t floor;         // 0: none; only for a single segment
  int64_t rank;           // entry whose key `tau` receives, at most k; 0: the k-th, or many segments
  float slack;            // part of a carried tau that candidates must reach
  // [segments] or null: keys of the last call's k-th entries (0: not known), for a guess that saves
  // a pass; receives those of this call, 0 where the rank-th key does not reach the floor.
  uint32_t* tau;
};

// Writes the packet and the new state; returns the bytes of the packet. Returns -1, with packet and
// state untouched, when t or u is not finite anywhere; only new state that goes elsewhere than the
// old one may then hold anything.
int64_t sparsify(const FeedbackArgs& feedback, const Selection& selection,
                 const SparsePacket& packet);

// Of how many runs a sample takes one, so that it holds about `wanted` of the k largest: odd, lest
// it fall in step with the rows of a matrix.
int64_t sample_step(int64_t length, int64_t k, int64_t wanted);

}  // namespace flcore
