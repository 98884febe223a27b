// Exact top-k with feedback: order of the passes and everything that is O(pieces) or O(segments).
//
// Entries of a segment are ordered by larger key(u) first, then smaller index; tau is the k-th key.
// Segments that fit in cache are selected one by one. For the others:
//   1. a cut below tau: a part of the tau of the last call, or of a sample's; or, when too few or
//      too many keys reach that, radix selection on the 31-bit key as 11 + 11 + 9 bits: a histogram of
//      the first digit of each piece finds the bin that holds tau, and if more than 2 k + 4096 keys
//      reach that bin, the next digit is counted the same way (then the last: tau is exact).
//   2. one sweep writes the new state and lists the candidates, keys from the cut up.
//   3. tau is found among the candidates; entries equal to it are taken from the first on.
//   4. the entries go into the packet, and the new state is corrected there.
// With such a guess the sweep is the only pass over memory. It may then find a value that is not
// finite after others were written, so it runs only when new state does not replace the old one.
#include "sparsify.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "arena.h"
#include "check.h"

namespace flcore {
namespace {

constexpr int64_t FEW = 4096;            // candidates that are always few enough
constexpr uint32_t TOP = 0x7f7fffffu;    // key of the largest finite number
constexpr int64_t ANY = int64_t(1) << 62;

using Numbers = std::vector<int64_t>;

uint32_t scaled_key(uint32_t key, float factor) {
  float x;
  std::memcpy(&x, &key, 4);
  x *= factor;
  std::memcpy(&key, &x, 4);
  return std::min(key & 0x7fffffffu, TOP);
}

// First item of each lane, then their number: at most `lanes` runs of about the same total size.
template <class Size>
Numbers even_lanes(int64_t count, int64_t lanes, const Size& size) {
  Numbers first = {0};
  double total = 0, done = 0;
  for (int64_t i = 0; i < count; ++i) total += double(size(i));
  for (int64_t i = 0; i < count; ++i) {
    const bool due = done >= total * double(first.size()) / double(lanes);
    if (due && int64_t(first.size()) < lanes && i > first.back()) first.push_back(i);
    done += double(size(i));
  }
  first.push_back(count);
  return first;
}

// Shares `need` entries among the pieces that have `ties` of them, first pieces first.
void share_ties(int64_t* ties, int64_t pieces, int64_t need) {
  for (int64_t p = 0; p < pieces; ++p) need -= ties[p] = std::min(ties[p], need);
}

// ---- the pieces of some segments, and the candidates in them ------------------------------------

struct Range {  // of a segment in a batch
  int64_t segment, first, last;
};

struct Batch {
  std::vector<SparsePiece> piece;
  std::vector<Range> ranges;
  std::vector<uint32_t> cut;  // [pieces]
  Numbers lane, region, from, count;
  uint16_t* local = nullptr;
  float *u = nullptr, *t = nullptr;
  Arena& arena;
  int threads;

  Batch(Arena& arena, int threads) : arena(arena), threads(threads) {}

  int64_t size() const { return int64_t(piece.size()); }
  int64_t length(int64_t p) const { return piece[size_t(p)].end - piece[size_t(p)].begin; }

  void add(int64_t segment, int64_t begin, int64_t end) {
    const int64_t first = size();
    for (int64_t at = begin; at < end;) {
      const int64_t stop = std::min((at / SPARSE_TILE + 1) * SPARSE_TILE, end);
      piece.push_back({at, stop, segment});
      at = stop;
    }
    ranges.push_back({segment, first, size()});
  }
  void finish() {
    lane = even_lanes(size(), threads, [&](int64_t p) { return length(p); });
    cut.assign(piece.size(), 0);
    from.assign(piece.size(), 0);
    count.assign(piece.size(), 0);
  }
  SparsePieces pieces() const {
    return {size(), piece.data(), int64_t(lane.size()) - 1, lane.data(), threads};
  }
  SparseCandidates candidates() {
    return {region.data(), from.data(), count.data(), local, u, t};
  }
  int64_t found(const Range& r) const {
    int64_t sum = 0;
    for (int64_t p = r.first; p < r.last; ++p) sum += count[size_t(p)];
    return sum;
  }

  // room: candidates of each piece that the lists must hold
  int sweep(const FeedbackArgs& x, const Numbers* quota, const Numbers& room) {
    region.assign(1, 0);
    for (size_t l = 0; l + 1 < lane.size(); ++l) {
      region.push_back(region.back());
      for (int64_t p = lane[l]; p < lane[l + 1]; ++p) region.back() += room[size_t(p)];
    }
    local = arena.take<uint16_t>(region.back());
    u = arena.take<float>(region.back());
    if (x.e) t = arena.take<float>(region.back());
    return cpu().sparsify->sweep(x, pieces(), cut.data(), quota ? quota->data() : nullptr,
                                 candidates());
  }
};

// A guess of tau from a sample that holds about 400 of the k entries.
uint32_t sampled_key(const FeedbackArgs& x, Arena& arena, int64_t begin, int64_t end, int64_t k) {
  const int64_t step = sample_step(end - begin, k, 400);
  const int64_t samples = sparse_samples(end - begin, step, step / 2);
  uint32_t* keys = arena.take<uint32_t>(samples);
  cpu().sparsify->sample(x, begin, end, step, step / 2, keys);
  const double rank = double(k) / double(end - begin) * double(samples);
  return cpu().sparsify->ranked(keys, samples, std::max(int64_t(rank), int64_t(1)));
}

// Steps 1 and 2 with cuts from the floor, the last call or a sample. False when there is none for
// some segment or the candidates are too many: then the batch holds nothing.
bool guess(const FeedbackArgs& x, const Selection& s, Batch& b, int& flags) {
  Numbers room(b.piece.size());
  for (const Range& r : b.ranges) {
    const int64_t begin = s.starts[r.segment], end = s.starts[r.segment + 1], k = s.k[r.segment];
    uint32_t cut = s.floor;
    if (!cut) {
      const uint32_t carried = s.tau ? s.tau[r.segment] : 0;
      cut = scaled_key(carried ? carried : sampled_key(x, b.arena, begin, end, k), s.slack);
    }
    if (cut == 0) return false;
    for (size_t l = 0; l + 1 < b.lane.size(); ++l) {
      // a lane never needs more room than all candidates that the segment may have
      int64_t left = std::max(4 * k, (end - begin) / 8) + FEW;
      for (int64_t p = std::max(b.lane[l], r.first); p < std::min(b.lane[l + 1], r.last); ++p) {
        b.cut[size_t(p)] = cut;
        left -= room[size_t(p)] = std::min(b.length(p), left);
      }
    }
  }
  flags = b.sweep(x, nullptr, room);
  return flags == 0;
}

// Steps 1 and 2 with histograms. False when a value is not finite; nothing is written then.
bool search(const FeedbackArgs& x, const Selection& s, Batch& b) {
  Numbers above(b.piece.size(), 0), within(b.piece.size(), 0), need(b.ranges.size());
  Numbers quota(b.piece.size(), ANY);  // entries equal to the cut: limited where the cut is tau
  std::vector<uint32_t> prefix(b.piece.size(), 0), tau_bin(b.piece.size(), 0);
  for (size_t i = 0; i < need.size(); ++i) need[i] = s.k[b.ranges[i].segment];
  std::vector<Range> open = b.ranges;
  std::vector<size_t> number(open.size());
  for (size_t i = 0; i < number.size(); ++i) number[i] = i;
  for (int level = 0; level < SPARSIFY_LEVELS && !open.empty(); ++level) {
    std::vector<SparsePiece> piece;
    std::vector<uint32_t> prefixes;
    for (const Range& r : open)
      for (int64_t p = r.first; p < r.last; ++p) {
        piece.push_back(b.piece[size_t(p)]);
        prefixes.push_back(prefix[size_t(p)]);
      }
    uint32_t* counts = b.arena.take<uint32_t>(int64_t(piece.size()) * SPARSIFY_BINS);
    const SparsePieces pieces{int64_t(piece.size()), piece.data(), 0, nullptr, b.threads};
    if (!cpu().sparsify->histogram(x, pieces, level, prefixes.data(), counts)) return false;
    const uint32_t* row = counts;
    std::vector<Range> still;
    std::vector<size_t> still_number;
    for (size_t i = 0; i < open.size(); ++i) {
      const Range& r = open[i];
      int64_t totals[SPARSIFY_BINS] = {}, &left = need[number[i]], reach = 0;
      for (int64_t p = r.first; p < r.last; ++p)
        for (int bin = 0; bin < SPARSIFY_BINS; ++bin)
          totals[bin] += row[(p - r.first) * SPARSIFY_BINS + bin];
      int bin = SPARSIFY_BINS - 1;
      for (; totals[bin] < left; --bin) left -= totals[bin];
      for (int64_t p = r.first; p < r.last; ++p, row += SPARSIFY_BINS) {
        for (int c = bin + 1; c < SPARSIFY_BINS; ++c) above[size_t(p)] += row[c];
        within[size_t(p)] = row[bin];
        reach += above[size_t(p)] + row[bin];
        prefix[size_t(p)] = (prefix[size_t(p)] << SPARSIFY_WIDTH[level]) | uint32_t(bin);
        tau_bin[size_t(p)] = prefix[size_t(p)] << SPARSIFY_SHIFT[level];
        b.cut[size_t(p)] = std::max(tau_bin[size_t(p)], s.floor);
      }
      if (reach <= 2 * s.k[r.segment] + FEW) continue;
      if (level + 1 == SPARSIFY_LEVELS) {
        share_ties(&within[size_t(r.first)], r.last - r.first, left);
        for (int64_t p = r.first; p < r.last; ++p) quota[size_t(p)] = within[size_t(p)];
      } else {
        still.push_back(r);
        still_number.push_back(number[i]);
      }
    }
    open.swap(still);
    number.swap(still_number);
  }
  Numbers room(b.piece.size());
  for (size_t p = 0; p < room.size(); ++p) {
    room[p] = above[p] + within[p];
    if (s.floor > tau_bin[p]) quota[p] = ANY;  // no ties with tau among the candidates
  }
  FLCORE_CHECK(b.sweep(x, &quota, room) == 0, "update: changed while it was read");
  return true;
}

// ---- the whole ----------------------------------------------------------------------------------

class Sparsifier {
 public:
  Sparsifier(const FeedbackArgs& feedback, const Selection& selection)
      : x_(feedback), s_(selection), at_(size_t(selection.segments) + 1, 0),
        tau_(size_t(selection.segments), 0), per_tile_(size_t(wire::tiles(feedback.numel)), 0) {
    for (int64_t s = 0; s < s_.segments; ++s) {
      at_[size_t(s) + 1] = at_[size_t(s)] + s_.k[s];
      const int64_t begin = s_.starts[s], end = s_.starts[s + 1];
      if (end - begin > SPARSE_TILE) {
        open_.push_back(s);
      } else if (end > begin) {
        small_.push_back({begin, end, s_.k[s], rank(s), at_[size_t(s)], 0, 0, 0});
        small_number_.push_back(s);
      }
    }
    local_ = arena_.take<uint16_t>(at_.back());
    u_ = arena_.take<float>(at_.back());
    if (x_.e) t_ = arena_.take<float>(at_.back());
  }

  // False: not finite.
  bool run() {
    const bool in_place = (x_.e && x_.e_new == x_.e) || (x_.v && x_.v_new == x_.v);
    if (in_place && !small(true)) return false;
    if (!in_place && !open_.empty()) {
      Batch b = batch();
      int flags = 0;
      if (guess(x_, s_, b, flags)) take(b);
      if (flags & SWEEP_NONFINITE) return false;
    }
    if (!open_.empty()) {
      Batch b = batch();
      if (!search(x_, s_, b)) return false;
      take(b);
    }
    return small(false);
  }

  SparseEntries entries() {
    starts_.assign(per_tile_.size() + 1, 0);
    for (size_t t = 0; t < per_tile_.size(); ++t) starts_[t + 1] = starts_[t] + per_tile_[t];
    return {starts_.data(), local_, u_, t_};
  }
  const std::vector<uint32_t>& tau() const { return tau_; }

 private:
  const FeedbackArgs& x_;
  const Selection& s_;
  Arena arena_;
  Numbers at_;  // [segments + 1] first entry of each segment
  std::vector<uint32_t> tau_;
  Numbers per_tile_, starts_;
  Numbers open_;  // larger segments that are not selected yet
  std::vector<SmallSegment> small_;
  Numbers small_number_;
  uint16_t* local_ = nullptr;
  float *u_ = nullptr, *t_ = nullptr;

  int64_t rank(int64_t s) const { return s_.rank ? s_.rank : s_.k[s]; }

  Batch batch() {
    Batch b(arena_, x_.threads);
    for (int64_t s : open_) b.add(s, s_.starts[s], s_.starts[s + 1]);
    b.finish();
    return b;
  }

  // Steps 3 and 4 up to the packet, for the segments that have enough candidates; the others stay open.
  void take(Batch& b) {
    const auto& kernels = *cpu().sparsify;
    const SparsePieces pieces = b.pieces();
    const SparseCandidates candidates = b.candidates();
    int64_t most = 0;
    for (const Range& r : b.ranges) most = std::max(most, b.found(r));
    uint32_t* scratch = arena_.take<uint32_t>(most);
    std::vector<uint32_t> tau(b.piece.size(), TOP);
    Numbers above(b.piece.size()), ties(b.piece.size()), at(b.piece.size() + 1, 0), still;
    std::vector<Range> taken;
    for (const Range& r : b.ranges) {
      const int64_t s = r.segment, k = s_.k[s], found = b.found(r);
      if (found < k && !s_.floor) {
        still.push_back(s);
        continue;
      }
      const uint32_t cut = b.cut[size_t(r.first)];
      const auto kth = [&](int64_t n) {
        return kernels.kth(pieces, candidates, r.first, r.last, cut, n, scratch);
      };
      uint32_t last = found >= k ? kth(k) : cut - 1;
      if (found >= rank(s)) tau_[size_t(s)] = rank(s) == k ? last : kth(rank(s));
      for (int64_t p = r.first; p < r.last; ++p) tau[size_t(p)] = last;
      taken.push_back(r);
    }
    kernels.count(pieces, candidates, tau.data(), above.data(), ties.data());
    Numbers quota(b.piece.size(), -1);
    for (const Range& r : taken) {
      int64_t need = s_.k[r.segment], next = at_[size_t(r.segment)];
      for (int64_t p = r.first; p < r.last; ++p) need -= above[size_t(p)];
      share_ties(&ties[size_t(r.first)], r.last - r.first, need);
      for (int64_t p = r.first; p < r.last; ++p) {
        quota[size_t(p)] = ties[size_t(p)];
        const int64_t count = above[size_t(p)] + ties[size_t(p)];
        at[size_t(p)] = next;
        per_tile_[size_t(b.piece[size_t(p)].begin / SPARSE_TILE)] += count;
        next += count;
      }
    }
    kernels.pick(pieces, candidates, tau.data(), quota.data(), at.data(), above.data(),
                 local_, u_, t_);
    open_.swap(still);
  }

  bool small(bool check) {
    if (small_.empty()) return true;
    const auto length = [&](int64_t i) { return small_[size_t(i)].end - small_[size_t(i)].begin; };
    const int64_t count = int64_t(small_.size());
    const Numbers lane = even_lanes(count, x_.threads, length);
    int64_t longest = 0;
    for (int64_t i = 0; i < count; ++i) longest = std::max(longest, length(i));
    const int64_t lanes = int64_t(lane.size()) - 1;
    float* scratch = arena_.take<float>(lanes * cpu().sparsify->small_scratch(longest));
    const SmallArgs args{count,        small_.data(), lanes,     lane.data(),   s_.floor, check,
                         local_, u_,      t_,  scratch, longest,  x_.threads};
    if (!cpu().sparsify->small(x_, args)) return false;
    for (size_t i = 0; !check && i < small_.size(); ++i) {
      const SmallSegment& s = small_[i];
      const size_t tile = size_t(s.begin / SPARSE_TILE);
      per_tile_[tile] += s.low;
      if (s.found > s.low) per_tile_[tile + 1] += s.found - s.low;
      tau_[size_t(small_number_[i])] = s.tau;
    }
    return true;
  }
};

}  // namespace

int64_t sample_step(int64_t length, int64_t k, int64_t wanted) {
  const int64_t most = std::max(length / (64 * SPARSE_RUN), int64_t(1));  // at least 64 runs
  return std::min(std::max(k / wanted, int64_t(1)), most) | 1;
}

int64_t sparsify(const FeedbackArgs& feedback, const Selection& selection,
                 const SparsePacket& packet) {
  FLCORE_CHECK(selection.segments >= 0 && selection.starts[0] == 0 &&
                   selection.starts[selection.segments] == feedback.numel,
               "segments: expected them to cover ", feedback.numel, " coordinates");
  for (int64_t s = 0; s < selection.segments; ++s) {
    const int64_t length = selection.starts[s + 1] - selection.starts[s], k = selection.k[s];
    FLCORE_CHECK(length >= 0 && k <= length && k >= (length > 0), "k[", s, "]: expected ",
                 int(length > 0), " to ", length, ", got ", k);
  }
  FLCORE_CHECK(selection.segments <= 1 || !(selection.floor || selection.rank),
               "floor and rank: expected one segment, got ", selection.segments);
  FLCORE_CHECK(selection.rank >= 0 && (!selection.rank || selection.rank <= selection.k[0]),
               "rank: expected at most k, got ", selection.rank);
  FLCORE_CHECK(selection.floor <= TOP, "floor: not a finite number");
  Sparsifier sparsifier(feedback, selection);
  if (!sparsifier.run()) return -1;
  const int64_t bytes = sparse_emit(feedback, sparsifier.entries(), packet);
  if (selection.tau)
    std::copy(sparsifier.tau().begin(), sparsifier.tau().end(), selection.tau);
  return bytes;
}

}  // namespace flcore
