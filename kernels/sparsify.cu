// Exact top-k with feedback on the GPU: the passes that python/flcore/ops/_sparsify_cuda.py queues. t, u,
// s and the state are those of FeedbackArgs in api.h, key(u) = bits(u) & 0x7fffffff; ties go to the
// smallest index. Parts are at most 8192 coordinates of one layer, one segment and one tile.
//   histogram  counts a digit of the keys of each segment, of all coordinates or of candidates
//   descend    finds the bin that holds the k-th key of a segment
//   sweep      e <- t, v <- s (or nothing), and a bit a coordinate: is its key at least the cut?
//   gather     index, u and t of each candidate; recomputed, so the old state must still be there
//   choose     counts keys above and at the k-th of each part, shares out the ties, packs the chosen
//   emit       values as on the wire; e <- t - D, h <- h + D, v <- 0 where masked
// EControl in float32: histogram reads 12 B a coordinate, sweep reads 12, writes 4 and a bit; what
// follows touches candidates. Counts are integers and every list is in order of coordinates (ballots
// and prefix sums give each its place): the same bits for any grid, those of csrc/sparsify.cpp.
// Source: "Parallel Top-K Algorithms on GPU", SC 2023, doi 10.1145/3581784.3607062 (radix select).
#include "feedback.cuh"
#include "launch.h"
#include "scan.cuh"

namespace flcore {
namespace cuda {

constexpr int THREADS = 256;
constexpr int BLOCKS_PER_SM = 6;
constexpr int EACH = 4;  // coordinates that a thread loads before it uses the first
constexpr int WORDS = int(SPARSE_PART / 32);
static_assert(WORDS == THREADS, "gather: a thread a word");

extern __shared__ uint4 shared_words[];

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % 32; }

// ---- histogram, descend ------------------------------------------------------------------------

struct Digit {  // one of SPARSIFY_LEVELS, and what a key must have above it
  int shift, width;
};

__device__ __forceinline__ void count_key(uint32_t key, const Digit& d, int64_t prefix,
                                          uint32_t* bins) {
  if (int64_t(key >> (d.shift + d.width)) == prefix)
    atomicAdd(bins + ((key >> d.shift) & ((1u << d.width) - 1)), 1u);
}

__device__ __forceinline__ void clear_bins(uint32_t* bins) {
  for (int b = int(threadIdx.x); b < SPARSIFY_BINS; b += THREADS) bins[b] = 0;
  __syncthreads();
}
__device__ __forceinline__ void flush_bins(uint32_t* bins, uint32_t* counts) {
  __syncthreads();
  for (int b = int(threadIdx.x); b < SPARSIFY_BINS; b += THREADS)
    if (bins[b]) atomicAdd(counts + b, bins[b]);
  __syncthreads();
}

// Counts the keys that visit(part, count) passes on, a run of parts a block. Shared: uint32
// [SPARSIFY_BINS].
template <class Visit>
__device__ __forceinline__ void histogram_parts(const SparseParts& parts, const Digit& d,
                                                const SparseSelect* select, uint32_t* counts,
                                                const Visit& visit) {
  uint32_t* bins = reinterpret_cast<uint32_t*>(shared_words);
  const int64_t first = parts.count * blockIdx.x / gridDim.x;
  const int64_t last = parts.count * (int64_t(blockIdx.x) + 1) / gridDim.x;
  for (int64_t p = first; p < last;) {
    const int64_t segment = parts.part[p].segment, prefix = select[segment].prefix;
    clear_bins(bins);
    for (; p < last && parts.part[p].segment == segment; ++p)
      visit(p, [&](uint32_t key) { count_key(key, d, prefix, bins); });
    flush_bins(bins, counts + segment * SPARSIFY_BINS);
  }
}

__global__ void __launch_bounds__(THREADS, 4)
    sparse_histogram(const __grid_constant__ FeedbackArgs x, const SparseParts parts, const Digit d,
                     const SparseSelect* select, uint32_t* counts, int32_t* flags) {
  bool finite = true;
  histogram_parts(parts, d, select, counts, [&](int64_t p, const auto& count) {
    const SparsePart part = parts.part[p];
    for (int64_t at = part.begin + threadIdx.x; at < part.end; at += EACH * THREADS) {
      Form<EACH> f;
      feedback_load<EACH>(x, part.layer, at, THREADS, part.end, f);
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        if (at + k * THREADS >= part.end) break;
        finite &= is_finite(f.t[k], f.u[k]);
        count(key_of(f.u[k]));
      }
    }
  });
  if (!finite) atomicOr(flags, 1);
}

__global__ void __launch_bounds__(THREADS)
    sparse_recount(const SparseParts parts, const Digit d, const SparseSelect* select,
                   const int64_t* starts, const float* u, uint32_t* counts) {
  histogram_parts(parts, d, select, counts, [&](int64_t p, const auto& count) {
    const int64_t end = starts[p + 1];
    for (int64_t j = starts[p] + threadIdx.x; j < end; j += THREADS) count(key_of(u[j]));
  });
}

// One block a segment; counts become 0. Shared: a word a warp.
__global__ void __launch_bounds__(THREADS)
    sparse_descend(const Digit d, SparseSelect* select, uint32_t* counts) {
  constexpr int BINS = SPARSIFY_BINS / THREADS;  // of a thread, from the last bin downwards
  SparseSelect s = select[blockIdx.x];
  uint32_t* bins = counts + int64_t(blockIdx.x) * SPARSIFY_BINS;
  uint32_t mine[BINS], sum = 0, total;
#pragma unroll
  for (int b = 0; b < BINS; ++b) {
    uint32_t* bin = bins + SPARSIFY_BINS - 1 - (BINS * int(threadIdx.x) + b);
    sum += mine[b] = *bin;
    *bin = 0;
  }
  int64_t before =
      scan_block<THREADS>(sum, reinterpret_cast<uint32_t*>(shared_words), total);
#pragma unroll
  for (int b = 0; b < BINS; ++b) {
    if (before < s.need && s.need <= before + mine[b]) {
      const int bin = SPARSIFY_BINS - 1 - (BINS * int(threadIdx.x) + b);
      select[blockIdx.x] = {s.need - before, s.above + before, int64_t(mine[b]),
                            s.prefix << d.width | bin};
    }
    before += mine[b];
  }
}

// ---- sweep, gather -----------------------------------------------------------------------------

// mask: [parts][WORDS], found: candidates of each part, zeroed; both null: state only.
__global__ void __launch_bounds__(THREADS)
    sparse_sweep(const __grid_constant__ FeedbackArgs x, const SparseParts parts,
                 const uint32_t* cut, bool write, uint32_t* mask, int32_t* found, int32_t* flags) {
  bool finite = true;
  for (int64_t p = blockIdx.x; p < parts.count; p += gridDim.x) {
    const SparsePart part = parts.part[p];
    const uint32_t bound = mask ? cut[part.segment] : 0;
    int32_t candidates = 0;
    // all lanes of a warp take part as long as one of them has a coordinate
    const int64_t warp = part.begin + (int64_t(threadIdx.x) - lane_id());
    for (int64_t first = warp; first < part.end; first += EACH * THREADS) {
      const int64_t at = first + lane_id();
      Form<EACH> f;
      feedback_load<EACH>(x, part.layer, at, THREADS, part.end, f);
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const int64_t i = at + k * THREADS;
        const bool valid = i < part.end;
        finite &= is_finite(f.t[k], f.u[k]);
        if (write && valid) {
          if (x.e_new) state_store(x, x.e_new, i, f.t[k], 0);
          if (x.v_new) state_store(x, x.v_new, i, f.s[k], 1);
        }
        if (!mask || first + k * THREADS >= part.end) continue;
        const uint32_t word = __ballot_sync(WHOLE_WARP, valid && key_of(f.u[k]) >= bound);
        if (lane_id() == 0) mask[p * WORDS + (first + k * THREADS - part.begin) / 32] = word;
        candidates += __popc(word);
      }
    }
    if (mask && lane_id() == 0 && candidates) atomicAdd(found + p, candidates);
  }
  if (!finite) atomicOr(flags, 1);
}

// Shared: a word a warp.
__global__ void __launch_bounds__(THREADS)
    sparse_gather(const __grid_constant__ FeedbackArgs x, const SparseParts parts,
                  const uint32_t* mask, const SparseList list) {
  for (int64_t p = blockIdx.x; p < parts.count; p += gridDim.x) {
    const SparsePart part = parts.part[p];
    const int64_t first = part.begin + 32 * int64_t(threadIdx.x);
    uint32_t word = first < part.end ? mask[p * WORDS + threadIdx.x] : 0, total;
    int64_t j = list.starts[p] + scan_block<THREADS>(uint32_t(__popc(word)),
                                                     reinterpret_cast<uint32_t*>(shared_words),
                                                     total);
    for (; word; word &= word - 1, ++j) {
      const int64_t i = first + __ffs(int(word)) - 1;
      Form<1> f;
      feedback_load<1>(x, part.layer, i, 1, part.end, f);
      list.local[j] = uint16_t(i % SPARSE_TILE);
      list.u[j] = f.u[0];
      if (list.t) list.t[j] = f.t[0];
    }
  }
}

// ---- choose ------------------------------------------------------------------------------------

// place[part] = {chosen, ties} for now: keys above the k-th, and equal to it. Zeroed before.
__global__ void __launch_bounds__(THREADS)
    sparse_count(const SparseParts parts, const SparseSelect* select, const int64_t* starts,
                 const float* u, SparsePlace* place) {
  for (int64_t p = blockIdx.x; p < parts.count; p += gridDim.x) {
    const uint32_t tau = uint32_t(select[parts.part[p].segment].prefix);
    const int64_t last = starts[p + 1];
    uint32_t above = 0, ties = 0;
    for (int64_t first = starts[p] + (int64_t(threadIdx.x) - lane_id()); first < last;
         first += THREADS) {
      const int64_t j = first + lane_id();
      const uint32_t key = j < last ? key_of(u[j]) : 0;
      above += uint32_t(__popc(__ballot_sync(WHOLE_WARP, j < last && key > tau)));
      ties += uint32_t(__popc(__ballot_sync(WHOLE_WARP, j < last && key == tau)));
    }
    if (lane_id() > 0) continue;
    if (above) atomicAdd(&place[p].above, above);
    if (ties) atomicAdd(&place[p].ties, ties);
  }
}

// One block a segment: its first parts get the ties that are wanted, and each part learns where its
// entries go, from `at[segment]` on. tiles: entries of each tile, zeroed before. Shared: a word a warp.
__global__ void __launch_bounds__(THREADS)
    sparse_place(const SparseParts parts, const SparseSelect* select, const int64_t* first_part,
                 const int64_t* at, SparsePlace* place, uint32_t* tiles) {
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_words);
  const int64_t first = first_part[blockIdx.x], last = first_part[blockIdx.x + 1];
  int64_t need = select[blockIdx.x].need, next = at[blockIdx.x];
  for (int64_t group = first; group < last; group += THREADS) {
    const int64_t p = group + threadIdx.x;
    SparsePlace mine = {0, 0, 0};
    if (p < last) mine = place[p];
    uint32_t all, total;
    const int64_t left = need - int64_t(scan_block<THREADS>(mine.ties, scratch, all));
    mine.ties = left <= 0 ? 0u : left < mine.ties ? uint32_t(left) : mine.ties;
    const uint32_t chosen = mine.above + mine.ties;
    mine.at = next + scan_block<THREADS>(chosen, scratch, total);
    if (p < last) {
      place[p] = mine;
      if (chosen) atomicAdd(tiles + parts.part[p].begin / SPARSE_TILE, chosen);
    }
    need -= all;
    next += total;
  }
}

// Shared: a word a warp.
__global__ void __launch_bounds__(THREADS)
    sparse_pick(const SparseParts parts, const SparseSelect* select, const SparseList from,
                const SparsePlace* place, const SparseList to) {
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_words);
  for (int64_t p = blockIdx.x; p < parts.count; p += gridDim.x) {
    const uint32_t tau = uint32_t(select[parts.part[p].segment].prefix);
    const SparsePlace here = place[p];
    const int64_t last = from.starts[p + 1];
    uint32_t above = 0, ties = 0;  // before this group of candidates
    for (int64_t group = from.starts[p]; group < last; group += THREADS) {
      const int64_t j = group + threadIdx.x;
      const uint32_t key = j < last ? key_of(from.u[j]) : 0;
      const bool more = j < last && key > tau, same = j < last && key == tau;
      uint32_t total;  // low half: above, high half: ties, at most 256 each
      const uint32_t rank = scan_block<THREADS>(uint32_t(more) | uint32_t(same) << 16, scratch, total);
      const uint32_t tie = ties + (rank >> 16);
      if (more || (same && tie < here.ties)) {
        const int64_t k = here.at + above + (rank & 0xffffu) + min(tie, here.ties);
        to.local[k] = from.local[j];
        to.u[k] = from.u[j];
        if (to.t) to.t[k] = from.t[j];
      }
      above += total & 0xffffu;
      ties += total >> 16;
    }
  }
}

// ---- emit --------------------------------------------------------------------------------------

// Writes the value as it is sent, returns what a receiver reads; finite values that would round to
// infinity become the largest finite one.
__device__ __forceinline__ float put_value(const EmitArgs& out, int64_t j, float u, float scale) {
  switch (out.value_dtype) {
    case F32: reinterpret_cast<float*>(out.values)[j] = u; return u;
    case F16: {
      uint16_t raw = narrow<F16>(u);
      if ((raw & 0x7fffu) == 0x7c00u) --raw;
      reinterpret_cast<uint16_t*>(out.values)[j] = raw;
      return widen<F16, float>(raw);
    }
    case BF16: {
      uint16_t raw = narrow<BF16>(u);
      if ((raw & 0x7fffu) == 0x7f80u) --raw;
      reinterpret_cast<uint16_t*>(out.values)[j] = raw;
      return widen<BF16, float>(raw);
    }
    default: {
      float code = scale > 0 ? __fdiv_rn(u, scale) : 0.0f;
      code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
      const int whole = int(__fsub_rn(__fadd_rn(code, 0x1.8p23f), 0x1.8p23f));  // to the nearest
      out.values[j] = uint8_t(int8_t(whole));
      return __fmul_rn(scale, float(whole));
    }
  }
}

// A block a tile. Shared: one word.
__global__ void __launch_bounds__(THREADS)
    sparse_emit(const __grid_constant__ FeedbackArgs x, const __grid_constant__ EmitArgs out) {
  uint32_t* top = reinterpret_cast<uint32_t*>(shared_words);
  const SparseEntries& entries = out.entries;
  const int64_t tile = blockIdx.x, begin = tile * SPARSE_TILE;
  const int64_t first = entries.starts[tile], last = entries.starts[tile + 1];
  float scale = 0.0f;
  if (out.value_dtype == WIRE_INT8) {
    if (threadIdx.x == 0) *top = 0;
    __syncthreads();
    uint32_t mine = 0;
    for (int64_t j = first + threadIdx.x; j < last; j += THREADS)
      mine = max(mine, key_of(entries.u[j]));
    atomicMax(top, mine);
    __syncthreads();
    constexpr float MOST = float(WIRE_LARGEST / 127.0 * (1 - 0x1p-24));
    scale = __fdiv_rn(__uint_as_float(*top), 127.0f);
    scale = scale < MOST ? scale : MOST;
    if (threadIdx.x == 0) reinterpret_cast<float*>(out.scales)[tile] = scale;
  }
  for (int64_t j = first + threadIdx.x; j < last; j += THREADS) {
    const int64_t i = begin + entries.local[j];
    const float sent = put_value(out, j, entries.u[j], scale);
    if (x.e_new) state_store(x, x.e_new, i, __fsub_rn(entries.t[j], sent), 0);
    if (x.h_new) x.h_new[i] = __fadd_rn(x.h_new[i], sent);
    if (x.v_new && x.mask && sent != 0.0f) {
      if (x.state_dtype == F32)
        static_cast<float*>(x.v_new)[i] = 0.0f;
      else
        static_cast<uint16_t*>(x.v_new)[i] = 0;
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------

constexpr size_t BIN_BYTES = 4 * SPARSIFY_BINS, SCAN_BYTES = 4 * (THREADS / 32);

static int64_t grid_for(int64_t parts, int device) {
  const int64_t resident = int64_t(multiprocessors(device)) * BLOCKS_PER_SM;
  return parts < resident ? parts : resident;
}
static cudaStream_t of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }
static Digit digit(int level) { return {SPARSIFY_SHIFT[level], SPARSIFY_WIDTH[level]}; }

void launch_sparse_histogram(const FeedbackArgs& x, const SparseParts& parts, int level,
                             const SparseSelect* select, uint32_t* counts, int32_t* flags,
                             int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  start("sparse_histogram", &sparse_histogram, grid_for(parts.count, device), THREADS, BIN_BYTES,
        of(stream), x, parts, digit(level), select, counts, flags);
}

void launch_sparse_recount(const SparseParts& parts, const SparseList& list, int level,
                           const SparseSelect* select, uint32_t* counts, int device,
                           uintptr_t stream) {
  const DeviceGuard guard(device);
  start("sparse_recount", &sparse_recount, grid_for(parts.count, device), THREADS, BIN_BYTES,
        of(stream), parts, digit(level), select, list.starts, static_cast<const float*>(list.u),
        counts);
}

void launch_sparse_descend(int64_t segments, int level, SparseSelect* select, uint32_t* counts,
                           int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  start("sparse_descend", &sparse_descend, segments, THREADS, SCAN_BYTES, of(stream), digit(level),
        select, counts);
}

void launch_sparse_sweep(const FeedbackArgs& x, const SparseParts& parts, const uint32_t* cut,
                         bool write, uint32_t* mask, int32_t* found, int32_t* flags, int device,
                         uintptr_t stream) {
  const DeviceGuard guard(device);
  start("sparse_sweep", &sparse_sweep, grid_for(parts.count, device), THREADS, 0, of(stream), x,
        parts, cut, write, mask, found, flags);
}

void launch_sparse_gather(const FeedbackArgs& x, const SparseParts& parts, const uint32_t* mask,
                          const SparseList& list, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  start("sparse_gather", &sparse_gather, grid_for(parts.count, device), THREADS, SCAN_BYTES,
        of(stream), x, parts, mask, list);
}

void launch_sparse_choose(const SparseParts& parts, int64_t segments, const SparseSelect* select,
                          const SparseList& from, const int64_t* first_part, const int64_t* at,
                          SparsePlace* place, uint32_t* tiles, const SparseList& to, int device,
                          uintptr_t stream) {
  const DeviceGuard guard(device);
  const int64_t blocks = grid_for(parts.count, device);
  start("sparse_count", &sparse_count, blocks, THREADS, 0, of(stream), parts, select, from.starts,
        static_cast<const float*>(from.u), place);
  start("sparse_place", &sparse_place, segments, THREADS, SCAN_BYTES, of(stream), parts, select,
        first_part, at, place, tiles);
  start("sparse_pick", &sparse_pick, blocks, THREADS, SCAN_BYTES, of(stream), parts, select, from,
        static_cast<const SparsePlace*>(place), to);
}

void launch_sparse_emit(const FeedbackArgs& x, const EmitArgs& out, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  start("sparse_emit", &sparse_emit, (x.numel + SPARSE_TILE - 1) / SPARSE_TILE, THREADS, 4,
        of(stream), x, out);
}

}  // namespace cuda
}  // namespace flcore
