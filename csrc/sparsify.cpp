// Exact top-k with feedback: order of the passes and everything that is O(k) or O(tiles).
//
// Entries are ordered by larger key(u) first, then smaller index; tau is the k-th key. Radix
// selection on the 31-bit key as 11 + 11 + 9 bits:
//   1. a histogram of the first digit per tile finds the bin that holds tau; if all keys from that
//      bin up are at most 2 k + 4096, they are the candidates. Otherwise the next digit is counted
//      the same way (all keys alike: three passes, then tau is exact).
//   2. one pass writes e <- t and pushes the candidates, in index order, to a side buffer; the
//      histograms say where each tile starts, so tiles need not wait for each other.
//   3. the remaining digits are counted on the side buffer. Entries equal to tau are taken from the
//      first tiles on until there are k.
//   4. the selected entries go straight into the packet, and e, h are corrected there.
// Nothing is written before the first histogram has found every t and u finite.
#include "sparsify.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"

namespace flcore {
namespace {

constexpr int64_t CANDIDATE_SLACK = 4096;

// State of the search for tau: `need` more entries lie among the keys that begin with `prefix`.
struct Search {
  int level = 0;            // digits known
  uint32_t prefix = 0;      // those digits
  int64_t need;

  bool exact() const { return level == SPARSIFY_LEVELS; }
  uint32_t lowest_key() const { return level ? prefix << SPARSIFY_SHIFT[level - 1] : 0; }

  // Picks the bin of the next digit that holds the need-th largest key; returns it.
  int descend(const int64_t* totals) {
    int bin = SPARSIFY_BINS - 1;
    for (; totals[bin] < need; --bin) need -= totals[bin];
    prefix = (prefix << SPARSIFY_WIDTH[level]) | uint32_t(bin);
    ++level;
    return bin;
  }
};

struct Candidates {
  int64_t count = 0;
  std::vector<int64_t> starts, quota;  // [tiles + 1], [tiles]
  std::unique_ptr<uint16_t[]> local;   // [count] index in the tile
  std::unique_ptr<float[]> u;          // [count]
};

uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffffu;
}

// Shares `need` entries equal to tau among the tiles that have `ties` of them, first tiles first.
void share_ties(std::vector<int64_t>& ties, int64_t need) {
  for (int64_t& tie : ties) {
    tie = std::min(tie, need);
    need -= tie;
  }
}

// Step 1. Returns false when a value is not finite; else fills starts and quota of the candidates.
bool find_candidates(const SparsifyArgs& args, int64_t k, Search& search, Candidates& found) {
  const int64_t tiles = wire::tiles(args.numel), enough = 2 * k + CANDIDATE_SLACK;
  const std::unique_ptr<uint32_t[]> counts(new uint32_t[size_t(tiles * SPARSIFY_BINS)]);
  std::vector<int64_t> above(size_t(tiles), 0), within(size_t(tiles), 0);
  do {
    if (!cpu().sparsify->histogram(args, search.level, search.prefix, counts.get())) return false;
    int64_t totals[SPARSIFY_BINS] = {};
    for (int64_t t = 0; t < tiles; ++t)
      for (int b = 0; b < SPARSIFY_BINS; ++b) totals[b] += counts[size_t(t * SPARSIFY_BINS + b)];
    const int bin = search.descend(totals);
    found.count = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const uint32_t* row = &counts[size_t(t * SPARSIFY_BINS)];
      for (int b = bin + 1; b < SPARSIFY_BINS; ++b) above[size_t(t)] += row[b];
      within[size_t(t)] = row[bin];
      found.count += above[size_t(t)] + row[bin];
    }
  } while (!search.exact() && found.count > enough);
  if (search.exact()) share_ties(within, search.need);
  found.starts.assign(size_t(tiles) + 1, 0);
  for (size_t t = 0; t < size_t(tiles); ++t)
    found.starts[t + 1] = found.starts[t] + above[t] + within[t];
  found.count = found.starts[size_t(tiles)];
  found.quota = std::move(within);
  return true;
}

// Step 3: the digits of tau that the histograms over all coordinates left open.
void finish_search(const Candidates& found, Search& search) {
  while (!search.exact()) {
    const int shift = SPARSIFY_SHIFT[search.level], width = SPARSIFY_WIDTH[search.level];
    int64_t totals[SPARSIFY_BINS] = {};
    for (int64_t c = 0; c < found.count; ++c) {
      const uint32_t key = key_of(found.u[size_t(c)]);
      totals[(key >> shift) & ((1u << width) - 1u)] += key >> (shift + width) == search.prefix;
    }
    search.descend(totals);
  }
}

}  // namespace

bool sparsify(const SparsifyArgs& args, const SparsifyPacket& packet) {
  const wire::Header& header = packet.header;
  const wire::Layout layout =
      wire::plan(args.numel, packet.k, header.index, header.value_dtype, packet.tensor_count);
  FLCORE_CHECK(packet.k <= args.numel && packet.k >= (args.numel > 0), "k: expected 1 to ",
               args.numel, ", got ", packet.k);
  FLCORE_CHECK(packet.out_bytes == layout.total_bytes, "out: expected ", layout.total_bytes,
               " bytes, got ", packet.out_bytes);
  const int64_t tiles = wire::tiles(args.numel);
  Search search;
  search.need = packet.k;
  Candidates found;
  std::vector<int64_t> starts(size_t(tiles) + 1, 0);
  if (tiles > 0) {
    if (!find_candidates(args, packet.k, search, found)) return false;
    found.local.reset(new uint16_t[size_t(found.count)]);
    found.u.reset(new float[size_t(found.count)]);
    cpu().sparsify->collect(args, search.lowest_key(), found.quota.data(), found.starts.data(),
                            found.local.get(), found.u.get());
    finish_search(found, search);
    const uint32_t tau = search.lowest_key();
    std::vector<int64_t> above(size_t(tiles), 0), ties(size_t(tiles), 0);
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t c = found.starts[size_t(t)]; c < found.starts[size_t(t) + 1]; ++c) {
        const uint32_t key = key_of(found.u[size_t(c)]);
        above[size_t(t)] += key > tau;
        ties[size_t(t)] += key == tau;
      }
    share_ties(ties, search.need);
    for (size_t t = 0; t < size_t(tiles); ++t) starts[t + 1] = starts[t] + above[t] + ties[t];

    EmitArgs emit;
    emit.candidate_starts = found.starts.data();
    emit.local = found.local.get();
    emit.candidates = found.u.get();
    emit.tau = tau;
    emit.quota = ties.data();
    emit.starts = starts.data();
    emit.bitmask = header.index == wire::BITMASK;
    emit.value_dtype = header.value_dtype;
    emit.indices = packet.out + layout.indices_at;
    emit.values = packet.out + layout.values_at;
    cpu().sparsify->emit(args, emit);
  }
  wire::write_frame(layout, starts.data(), packet.tensors, header, packet.out);
  wire::seal(packet.out, size_t(packet.out_bytes));
  return true;
}

}  // namespace flcore
