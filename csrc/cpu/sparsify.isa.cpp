// The passes of exact top-k with feedback (csrc/sparsify.cpp puts them together); t, u, s and the
// state are those of FeedbackArgs in api.h.
//   histogram  counts one digit of key(u) = bits(u) & 0x7fffffff for each piece
//   sweep      e <- t, v <- s everywhere, and (local index, u, t) of each coordinate with a key >= cut
//   kth, count, pick   exact selection among those candidates
//   small      all of it at once for segments that fit in cache
//   emit       the selected entries into the packet; e <- t - D, h <- h + D there, D the decoded value
// EControl in float32: histogram reads 12 B a coordinate, sweep reads 12 and writes 4 past the caches,
// the rest touches k places: 16 B with a known cut, 28 B with the histogram. Integer counts, lists
// in the order of coordinates: the same bits for any number of threads and any level.
// Source: specs econtrol and topk-selection-kernels (Gao et al. 2024; radix select).
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/entries.h"
#include "cpu/feedback.h"
#include "cpu/layers.h"
#include "cpu/sparse_emit.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t BLOCK = 1024;  // coordinates that wait in L1: 4 KiB an array
constexpr int COPIES = 4;        // interleaved histograms: equal neighbours hit different counters
constexpr int SPARE = SPARSIFY_BINS;  // bin of the keys outside the prefix

FLCORE_INLINE int64_t tile_start(int64_t coordinate) {
  return coordinate / SPARSE_TILE * SPARSE_TILE;
}

// ---- histogram --------------------------------------------------------------------------------

// Bin of a key: its digit at `shift`, or SPARE when the bits above are not `prefix`.
FLCORE_INLINE vi32 bin_of(const vi32& key, int shift, int width, int prefix) {
  const vi32 digit = (key >> shift) & ((1 << width) - 1);
  return (key >> (shift + width)) == prefix ? digit : digit * 0 + SPARE;
}
FLCORE_INLINE int32_t bin_of(uint32_t key, int shift, int width, int prefix) {
  return int(key >> (shift + width)) == prefix ? int(key >> shift) & ((1 << width) - 1) : SPARE;
}

struct HistogramVisit {
  int32_t* bins;
  int shift, width, prefix;

  template <class Kind>
  FLCORE_MEMBER void one(int64_t i, const FeedbackValues<float>& x) {
    bins[i] = bin_of(key_of(x.u), shift, width, prefix);
  }
  template <class Kind>
  FLCORE_MEMBER void many(int64_t i, const FeedbackValues<vf32>& x) {
    store(bins + i, bin_of(key_of(x.u), shift, width, prefix));
  }
};

static bool histogram_piece(const FeedbackArgs& x, const SparsePiece& piece, int level,
                            uint32_t prefix, uint32_t* out) {
  uint16_t counts[COPIES][SPARSIFY_BINS + 8];  // a tile gives one copy at most 16,384 + 1024
  __builtin_memset(counts, 0, sizeof(counts));
  alignas(64) float memory[FEEDBACK_PARTS * BLOCK];
  const FeedbackBuffers buffers = feedback_buffers(memory, BLOCK);
  int32_t bins[BLOCK];
  HistogramVisit visit = {bins, SPARSIFY_SHIFT[level], SPARSIFY_WIDTH[level], int(prefix)};
  int64_t layer = find_layer(x.starts, x.layers, piece.begin);
  for (int64_t at = piece.begin; at < piece.end; at += BLOCK) {
    const int64_t count = at + BLOCK < piece.end ? BLOCK : piece.end - at;
    const FeedbackSources from = feedback_sources(x, at, count, layer, buffers);
    if (!feedback_visit(x, from, 0, count, visit)) return false;
    int64_t j = 0;
    for (; j + COPIES <= count; j += COPIES)
      for (int c = 0; c < COPIES; ++c) ++counts[c][bins[j + c]];
    for (; j < count; ++j) ++counts[0][bins[j]];
  }
  for (int b = 0; b < SPARSIFY_BINS; ++b) {
    uint32_t sum = 0;
    for (int c = 0; c < COPIES; ++c) sum += counts[c][b];
    out[b] = sum;
  }
  return true;
}

bool histogram(const FeedbackArgs& x, const SparsePieces& pieces, int level,
               const uint32_t* prefix, uint32_t* counts) {
  int32_t bad = 0;
  for_chunks(pieces.count, pieces.threads, [&](int64_t p) {
    if (!histogram_piece(x, pieces.piece[p], level, prefix[p], counts + p * SPARSIFY_BINS))
      __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
  });
  return bad == 0;
}

// ---- sweep ------------------------------------------------------------------------------------

// Takes candidates and writes float32 state while u is in registers.
struct SweepVisit {
  float *e, *v;         // new state of the stretch's first coordinate
  bool fresh_e, fresh_v;  // past the caches; whole lines
  int32_t first;        // local index of the stretch's first coordinate
  Choice choice;
  EntryList list;

  template <class Kind>
  FLCORE_MEMBER void one(int64_t i, const FeedbackValues<float>& x) {
    if constexpr (Kind::E) e[i] = x.t;
    if constexpr (Kind::V) v[i] = x.s;
    if (choice.one(key_of(x.u))) list.put(first + int32_t(i), x.u, x.t);
  }
  template <class Kind>
  FLCORE_MEMBER void many(int64_t i, const FeedbackValues<vf32>& x) {
    if constexpr (Kind::E) put(e + i, x.t, fresh_e);
    if constexpr (Kind::V) put(v + i, x.s, fresh_v);
    const uint32_t mask = choice.lanes(key_of(x.u));
    if (!Kind::E || mask)  // without state to write, pushing nothing costs less than a wrong guess
      list.push(mask, lane_numbers() + (first + int32_t(i)), x.u, x.t);
  }

 private:
  FLCORE_MEMBER static void put(float* to, const vf32& x, bool fresh) {
    if (fresh)
      stream(to, x);
    else
      store(to, x);
  }
};

// Floats up to the next cache line.
FLCORE_INLINE int64_t to_line(const float* p) {
  return int64_t(-(reinterpret_cast<uintptr_t>(p) / 4) & 15u);
}

static bool sweep_stretch(const FeedbackArgs& x, const FeedbackSources& from, int64_t at,
                          int64_t count, int64_t base, Choice& choice, EntryList& list) {
  float* e = x.e_new ? static_cast<float*>(x.e_new) + at : nullptr;
  float* v = x.v_new ? static_cast<float*>(x.v_new) + at : nullptr;
  const int64_t head = e ? to_line(e) : v ? to_line(v) : 0;
  SweepVisit visit = {e, v, x.e_new != x.e, x.v_new != x.v && to_line(v) == head,
                      int32_t(at - base), choice, list};
  const bool finite = feedback_visit(x, from, head, count, visit);
  choice = visit.choice;
  list = visit.list;
  return finite;
}

static int sweep_piece(const FeedbackArgs& x, const SparsePiece& piece, uint32_t cut,
                       int64_t quota, EntryList& list) {
  alignas(64) float memory[FEEDBACK_PARTS * BLOCK];
  const FeedbackBuffers buffers = feedback_buffers(memory, BLOCK);
  const int64_t base = tile_start(piece.begin);
  Choice choice = choice_of(cut, quota);
  int64_t layer = find_layer(x.starts, x.layers, piece.begin);
  for (int64_t at = piece.begin, count; at < piece.end; at += count) {
    while (at >= x.starts[layer + 1]) ++layer;
    count = piece.end - at < BLOCK ? piece.end - at : BLOCK;
    bool finite;
    if (x.state_dtype == F32) {
      const int64_t left = x.starts[layer + 1] - at;
      if (x.dtype[layer] == F32 && left > BLOCK) count = left < piece.end - at ? left : piece.end - at;
      finite = sweep_stretch(x, feedback_sources(x, at, count, layer, buffers), at, count, base,
                             choice, list);
    } else {
      const FeedbackBlock block = feedback_load(x, at, count, layer, buffers);
      finite = block.finite;
      choose(block.u, x.e ? block.t : nullptr, count, int32_t(at - base), choice, list);
      if (finite) feedback_store(x, at, count, block, nullptr, buffers.t);
    }
    if (!finite) return SWEEP_NONFINITE;
    if (list.full) return SWEEP_FULL;
  }
  return 0;
}

int sweep(const FeedbackArgs& x, const SparsePieces& pieces, const uint32_t* cut,
          const int64_t* quota, const SparseCandidates& out) {
  int32_t flags = 0;
  for_chunks(pieces.lanes, pieces.threads, [&](int64_t lane) {
    EntryList list = {out.local, out.u, x.e ? out.t : nullptr,
                      out.region[lane], out.region[lane + 1], false};
    for (int64_t p = pieces.lane[lane]; p < pieces.lane[lane + 1]; ++p) {
      if (__atomic_load_n(&flags, __ATOMIC_RELAXED)) break;
      out.from[p] = list.at;
      if (const int flag = sweep_piece(x, pieces.piece[p], cut[p], quota ? quota[p] : ANY, list))
        __atomic_fetch_or(&flags, flag, __ATOMIC_RELAXED);
      out.count[p] = list.at - out.from[p];
    }
    feedback_fence();
  });
  return flags;
}

// ---- selection among candidates ---------------------------------------------------------------

constexpr int WINDOW_SHIFT = 13;  // bins of 2^13 keys, a 1024th of an octave; the last has no end

uint32_t kth(const SparsePieces& pieces, const SparseCandidates& c, int64_t first, int64_t last,
             uint32_t cut, int64_t k, uint32_t* scratch) {
  const auto overlap = [&](int64_t lane, int64_t& from, int64_t& to) {
    from = pieces.lane[lane] > first ? pieces.lane[lane] : first;
    to = pieces.lane[lane + 1] < last ? pieces.lane[lane + 1] : last;
    return from < to;
  };
  // candidates of a lane lie together: one run of them
  const auto run = [&](int64_t from, int64_t to, int64_t& count) {
    count = c.from[to - 1] + c.count[to - 1] - c.from[from];
    return c.u + c.from[from];
  };
  uint32_t counts[KTH_BINS] = {};
  for_chunks(pieces.lanes, pieces.threads, [&](int64_t lane) {
    int64_t from, to, count;
    if (!overlap(lane, from, to)) return;
    const float* u = run(from, to, count);
    uint32_t mine[2][KTH_BINS];
    __builtin_memset(mine, 0, sizeof(mine));
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bin = (key_of(u[i]) - cut) >> WINDOW_SHIFT;
      ++mine[i & 1][bin < KTH_BINS ? bin : KTH_BINS - 1];
    }
    for (int b = 0; b < KTH_BINS; ++b)
      if (const uint32_t sum = mine[0][b] + mine[1][b])
        __atomic_fetch_add(counts + b, sum, __ATOMIC_RELAXED);
  });
  const int bin = descend(counts, k);
  const uint32_t low = cut + (uint32_t(bin) << WINDOW_SHIFT);
  const uint32_t high = bin == KTH_BINS - 1 ? 0x7fffffffu : low + ((1u << WINDOW_SHIFT) - 1);
  int64_t kept = 0;
  for (int64_t lane = 0; lane < pieces.lanes; ++lane) {
    int64_t from, to, count;
    if (!overlap(lane, from, to)) continue;
    const float* u = run(from, to, count);
    kept += keys_between(u, count, low, high, scratch + kept);
  }
  return kth_largest(scratch, kept, k);
}

void count(const SparsePieces& pieces, const SparseCandidates& c, const uint32_t* tau,
           int64_t* above, int64_t* ties) {
  for_chunks(pieces.count, pieces.threads, [&](int64_t p) {
    const float* u = c.u + c.from[p];
    const vi32 bound = vi32{} + int32_t(tau[p]);
    int64_t more = 0, same = 0, i = 0;
    for (; i + LANES <= c.count[p]; i += LANES) {
      const vi32 key = key_of(load<vf32>(u + i));
      more += __builtin_popcount(lanes_above(key, bound));
      same += __builtin_popcount(lanes_equal(key, bound));
    }
    for (; i < c.count[p]; ++i) {
      more += key_of(u[i]) > tau[p];
      same += key_of(u[i]) == tau[p];
    }
    above[p] = more;
    ties[p] = same;
  });
}

void pick(const SparsePieces& pieces, const SparseCandidates& c, const uint32_t* tau,
          const int64_t* quota, const int64_t* at, const int64_t* above, uint16_t* local, float* u,
          float* t) {
  for_chunks(pieces.count, pieces.threads, [&](int64_t p) {
    if (quota[p] < 0) return;
    EntryList list = {local, u, t, at[p], at[p] + above[p] + quota[p], false};
    Choice choice = choice_of(tau[p], quota[p]);
    const int64_t from = c.from[p], count = c.count[p];
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
      const vf32 uv = load<vf32>(c.u + from + i);
      if (const uint32_t mask = choice.lanes(key_of(uv))) {
        const vi32 index = __builtin_convertvector(load<vu16h>(c.local + from + i), vi32);
        list.push(mask, index, uv, t ? load<vf32>(c.t + from + i) : uv);
      }
    }
    for (; i < count; ++i)
      if (choice.one(key_of(c.u[from + i])))
        list.put(c.local[from + i], c.u[from + i], t ? c.t[from + i] : 0.0f);
  });
}

// ---- small segments ---------------------------------------------------------------------------

constexpr int SMALL_PARTS = FEEDBACK_PARTS + 1;

static int64_t small_part(int64_t longest) { return (longest + 15) / 16 * 16; }

static bool small_segment(const FeedbackArgs& x, const SmallArgs& args, SmallSegment& segment,
                          float* scratch) {
  const int64_t part = small_part(args.longest), count = segment.end - segment.begin;
  const FeedbackBuffers buffers = feedback_buffers(scratch, part);
  uint32_t* keys = reinterpret_cast<uint32_t*>(scratch + FEEDBACK_PARTS * part);
  int64_t layer = find_layer(x.starts, x.layers, segment.begin);
  const FeedbackBlock block = feedback_load(x, segment.begin, count, layer, buffers);
  if (!block.finite || args.check) return block.finite;
  const auto ranked = [&](int64_t k) {
    for (int64_t i = 0; i < count; ++i) keys[i] = key_of(load<float>(block.u + i));
    return kth_largest(keys, count, k);
  };
  const uint32_t tau = ranked(segment.k);
  const uint32_t asked = segment.rank == segment.k ? tau : ranked(segment.rank);
  segment.tau = asked < args.floor ? 0 : asked;
  Choice choice = choice_of(args.floor, ANY);
  if (tau >= args.floor) {
    int64_t above = 0;
    for (int64_t i = 0; i < count; ++i) above += key_of(load<float>(block.u + i)) > tau;
    choice = choice_of(tau, segment.k - above);
  }
  EntryList list = {args.local, args.u, args.t, segment.at, segment.at + segment.k, false};
  const int64_t base = tile_start(segment.begin), border = base + SPARSE_TILE;
  const int64_t low = (segment.end < border ? segment.end : border) - segment.begin;
  const float* t = args.t ? block.t : nullptr;
  choose(block.u, t, low, int32_t(segment.begin - base), choice, list);
  segment.low = list.at - segment.at;
  if (low < count)
    choose(block.u + low, t ? t + low : nullptr, count - low, 0, choice, list);
  segment.found = list.at - segment.at;
  feedback_store(x, segment.begin, count, block, nullptr, buffers.t);
  return true;
}

bool small(const FeedbackArgs& x, const SmallArgs& args) {
  int32_t bad = 0;
  for_chunks(args.lanes, args.threads, [&](int64_t lane) {
    float* scratch = args.scratch + lane * SMALL_PARTS * small_part(args.longest);
    for (int64_t s = args.lane[lane]; s < args.lane[lane + 1]; ++s)
      if (args.segment[s].k > 0 && !small_segment(x, args, args.segment[s], scratch)) {
        __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        break;
      }
    feedback_fence();
  });
  return bad == 0;
}

int64_t small_scratch(int64_t longest) { return SMALL_PARTS * small_part(longest); }

// ---- emit -------------------------------------------------------------------------------------

void emit(const FeedbackArgs& x, const EmitArgs& out) {
  for_chunks((x.numel + SPARSE_TILE - 1) / SPARSE_TILE, x.threads,
             [&](int64_t tile) { emit_tile(x, out, tile); });
}

// ---- sample -----------------------------------------------------------------------------------

void sample(const FeedbackArgs& x, int64_t begin, int64_t end, int64_t step, int64_t phase,
            uint32_t* keys) {
  const int64_t period = SPARSE_RUN * step, first = begin + SPARSE_RUN * phase;
  const int64_t runs = first < end ? (end - first + period - 1) / period : 0;
  constexpr int64_t GROUP = 32;  // runs that a thread takes at a time
  for_chunks((runs + GROUP - 1) / GROUP, x.threads, [&](int64_t group) {
    alignas(64) float memory[FEEDBACK_PARTS * SPARSE_RUN];
    const FeedbackBuffers buffers = feedback_buffers(memory, SPARSE_RUN);
    int64_t layer = find_layer(x.starts, x.layers, first + group * GROUP * period);
    for (int64_t r = group * GROUP; r < runs && r < (group + 1) * GROUP; ++r) {
      const int64_t at = first + r * period;
      const int64_t count = at + SPARSE_RUN < end ? SPARSE_RUN : end - at;
      const FeedbackBlock block = feedback_load(x, at, count, layer, buffers);
      for (int64_t i = 0; i < count; ++i)
        keys[SPARSE_RUN * r + i] = key_of(load<float>(block.u + i));
    }
  });
}

uint32_t ranked(uint32_t* keys, int64_t count, int64_t k) { return kth_largest(keys, count, k); }

}  // namespace
}  // namespace FLCORE_ISA

extern const SparsifyFns FLCORE_TABLE(sparsify);
const SparsifyFns FLCORE_TABLE(sparsify) = {
    &FLCORE_ISA::histogram, &FLCORE_ISA::sweep, &FLCORE_ISA::kth,
    &FLCORE_ISA::count,     &FLCORE_ISA::pick,  &FLCORE_ISA::small,
    &FLCORE_ISA::small_scratch, &FLCORE_ISA::emit, &FLCORE_ISA::sample, &FLCORE_ISA::ranked};

}  // namespace flcore
