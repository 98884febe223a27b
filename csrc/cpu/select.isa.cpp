// Order statistics of every coordinate over n client rows: median, trimmed mean, and the mean of
// the values nearest to either. Reads every value once and writes one row: n*s + s bytes a
// coordinate (s = bytes of the dtype). The work is the compare-exchanges of a sorting network, one
// minimum and one maximum each for LANES coordinates:
//   n <= 32    all values in registers, network specialised for n, for the median pruned to it
//   n <= 128   runs of 32 sorted in registers, merged in registers through the first-level cache
//   beyond, and float64: Batcher's network over values in cache
//
// Exactness: comparing is exact; means are summed from the smallest value up in float32 (float64
// for a float64 layer) and divided once. So neither the order of the rows, nor the level, the tile
// or the number of threads changes a bit. Minimum and maximum lose a NaN, so the values of a
// coordinate are also added up: where that sum is finite all of them are.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/layers.h"
#include "cpu/packets.h"
#include "cpu/scratch.h"
#include "cpu/sorted.h"
#include "cpu/staging.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t TILE = 4096;          // coordinates of one piece of work
constexpr int64_t STAGE = 16 << 10;     // bytes of rows that are converted or mixed before sorting
constexpr int64_t MAX_STAGED = 256;     // coordinates staged at once at most
constexpr int64_t DECODED = 128 << 10;  // bytes of packets decoded at once

// Coordinates staged at once: whole vectors, a few rows of cache lines.
static int64_t staged(int64_t n) {
  const int64_t fit = STAGE / (8 * n) / LANES * LANES;
  return fit < LANES ? LANES : fit > MAX_STAGED ? MAX_STAGED : fit;
}

// ---- kernels: m coordinates (whole vectors) of rows p ------------------------------------------

typedef bool (*SelectFn)(const char* const* p, int64_t m, const Plan& plan, vf32* buffer,
                         float* out);

// Accumulates what is not finite: x * 0 is 0 or NaN.
template <class V>
static bool any_nan(const V& total) {
  auto sum = total[0] * 0;
  for (int k = 0; k < int(sizeof(V) / sizeof(sum)); ++k) sum += total[k];
  return !(sum == 0);
}

// The values of N rows at coordinates i .. i + LANES - 1; returns their sum.
template <int N>
FLCORE_INLINE vf32 load_values(const char* const* p, int64_t i, vf32* v) {
  vf32 sum = {};
  unroll<N>([&](auto r) FLCORE_LAMBDA {
    const char* at = p[r.value] + 4 * i;
    __builtin_prefetch(at + AHEAD, 0, 2);
    v[r.value] = load<vf32>(at);
    sum += v[r.value];
  });
  return sum;
}

template <int N>
static bool median_in_registers(const char* const* p, int64_t m, const Plan& plan, vf32*,
                                float* out) {
  typedef SortNetwork<N, (N - 1) / 2, N / 2> Net;
  vf32 total = {};
  for (int64_t i = 0; i < m; i += LANES) {
    vf32 v[N];
    total += load_values<N>(p, i, v) * 0.0f;
    run_network<Net>(v);
    constexpr int A = Net::net.order.at[(N - 1) / 2], B = Net::net.order.at[N / 2];
    const vf32 c = N % 2 ? v[A] : middle(v[A], v[B], plan.median);
    store(out + i, c + 0.0f);
  }
  return any_nan(total);
}

template <int N>
static bool sort_in_registers(const char* const* p, int64_t m, const Plan& plan, vf32* a,
                              float* out) {
  typedef SortNetwork<N> Net;
  vf32 total = {};
  for (int64_t i = 0; i < m; i += LANES) {
    vf32 v[N];
    total += load_values<N>(p, i, v) * 0.0f;
    run_network<Net>(v);
    if (plan.op == SELECT_TRIMMED_MEAN) {  // as `statistic` does it, without a way through memory
      vf32 sum = {};
      unroll<N>([&](auto r) FLCORE_LAMBDA {
        if (r.value >= plan.f && r.value < N - plan.f) sum = sum + v[Net::net.order.at[r.value]];
      });
      store(out + i, sum / (vf32{} + float(N - 2 * plan.f)));
      continue;
    }
    unroll<N>([&](auto r) FLCORE_LAMBDA { a[r.value] = v[Net::net.order.at[r.value]]; });
    store(out + i, statistic<vf32, float>(a, plan));
  }
  return any_nan(total);
}

// Instrumented networks take minutes to compile: a sanitizer build has some sizes, null for others.
template <int N>
constexpr bool built() {
#if defined(__SANITIZE_ADDRESS__)
  return N == 1 || N == 5 || N == 32;
#else
  return true;
#endif
}
template <int N>
constexpr SelectFn median_of() {
  if constexpr (built<N>()) return &median_in_registers<N>;
  return nullptr;
}
template <int N>
constexpr SelectFn sort_of() {
  if constexpr (built<N>()) return &sort_in_registers<N>;
  return nullptr;
}

#define FLCORE_MEDIAN(n) median_of<n>()
#define FLCORE_SORT(n) sort_of<n>()
static const SelectFn MEDIAN[33] = {nullptr, FLCORE_1_TO_16(FLCORE_MEDIAN),
                                    FLCORE_17_TO_32(FLCORE_MEDIAN)};
static const SelectFn SORT[33] = {nullptr, FLCORE_1_TO_16(FLCORE_SORT),
                                  FLCORE_17_TO_32(FLCORE_SORT)};

// Runs of 32 and a last one whose length is a multiple of 4.
#define FLCORE_SORT_RUN(n) &network_in_place<SortNetwork<n>>
static const NetworkFn SORT_RUN[9] = {nullptr,
                                      FLCORE_SORT_RUN(4),
                                      FLCORE_SORT_RUN(8),
                                      FLCORE_SORT_RUN(12),
                                      FLCORE_SORT_RUN(16),
                                      FLCORE_SORT_RUN(20),
                                      FLCORE_SORT_RUN(24),
                                      FLCORE_SORT_RUN(28),
                                      FLCORE_SORT_RUN(32)};

// Sorts a[0 .. n - 1]; what follows up to a multiple of 4 is overwritten.
static void sort_values(vf32* a, int64_t n, const Wanted& want) {
  if (n <= 32 || n > 128) return sort_general(a, n);
  const int64_t padded = (n + 3) / 4 * 4;
  for (int64_t i = n; i < padded; ++i) a[i] = vf32{} + __builtin_inff();
  for (int64_t first = 0; first < n; first += 32)
    SORT_RUN[padded - first < 32 ? (padded - first) / 4 : 8](a + first, 1);
  if (n <= 64) return merge_32(a, n, want);
  merge_32(a, 64, {0, 63});
  if (n > 96) merge_32(a + 64, n - 64, {0, n - 65});
  merge_64(a, n, want);
}
static void sort_values(vf64* a, int64_t n, const Wanted&) { sort_general(a, n); }

// Any number of rows: the values of one vector of coordinates are sorted in cache.
template <class T>
static bool sort_in_cache(const char* const* p, int64_t m, const Plan& plan,
                          typename VectorOf<T>::type* a, T* out) {
  typedef typename VectorOf<T>::type V;
  constexpr int64_t WIDTH = int64_t(sizeof(V) / sizeof(T));
  const bool middle = plan.op == SELECT_MEDIAN;
  const Wanted want{middle ? (plan.n - 1) / 2 : 0, middle ? plan.n / 2 : plan.n - 1};
  V total = {};
  for (int64_t i = 0; i < m; i += WIDTH) {
    V sum = {};
    for (int64_t r = 0; r < plan.n; ++r) {
      const char* at = p[r] + int64_t(sizeof(T)) * i;
      __builtin_prefetch(at + AHEAD, 0, 2);
      a[r] = load<V>(at);
      sum += a[r];
    }
    total += sum * T(0);
    sort_values(a, plan.n, want);
    store(out + i, statistic<V, T>(a, plan));
  }
  return any_nan(total);
}

static bool run(const char* const* p, int64_t m, const Plan& plan, void* buffer, float* out) {
  vf32* a = static_cast<vf32*>(buffer);
  if (plan.n <= 32)
    if (const SelectFn kernel = (plan.op == SELECT_MEDIAN ? MEDIAN : SORT)[plan.n])
      return kernel(p, m, plan, a, out);
  return sort_in_cache<float>(p, m, plan, a, out);
}
static bool run(const char* const* p, int64_t m, const Plan& plan, void* buffer, double* out) {
  return sort_in_cache<double>(p, m, plan, static_cast<vf64*>(buffer), out);
}

// ---- work of one thread ------------------------------------------------------------------------

// Scratch of one thread.
struct Workspace {
  const char** p;  // [count] where the values of each row start
  char* buffer;    // [count + 3] vectors
  char* rows;      // [count][staged] values
  char* raw;       // [n][staged] values before they are mixed
  char* used;      // [n] whether a row has a coefficient
  char* packets;   // packet_bytes
};

// Coordinates of packets decoded at once.
static int64_t block_of(const SelectArgs& a) {
  const int64_t fit = DECODED / (4 * a.n) / 64 * 64, least = whole_bucket(a.packets, a.n);
  const int64_t block = fit < 512 ? 512 : fit < TILE ? fit : TILE;
  return block < least ? least : block;
}

static int64_t packet_bytes(const SelectArgs& a) {
  if (!a.packets) return 0;
  return whole_lines(8 * a.n) + 4 * a.n * row_stride(block_of(a)) + 4 * DECODE_WORK;
}

static int64_t scratch_bytes(const SelectArgs& a) {
  const int64_t n = a.n, count = a.count;
  return whole_lines(8 * count) + whole_lines(VEC_BYTES * (count + 3)) +
         whole_lines(8 * count * staged(count)) + whole_lines(8 * n * staged(count)) +
         whole_lines(n) + packet_bytes(a);
}

static Workspace workspace(const SelectArgs& a, int64_t thread) {
  char* base = static_cast<char*>(a.scratch) + thread * scratch_bytes(a);
  char* buffer = base + whole_lines(8 * a.count);
  char* rows = buffer + whole_lines(VEC_BYTES * (a.count + 3));
  char* raw = rows + whole_lines(8 * a.count * staged(a.count));
  char* used = raw + whole_lines(8 * a.n * staged(a.count));
  for (int64_t r = 0; r < a.n; ++r) used[r] = 0;
  if (a.mix_starts)
    for (int64_t e = 0; e < a.mix_starts[a.count]; ++e) used[a.mix_rows[e]] = 1;
  return {reinterpret_cast<const char**>(base), buffer, rows, raw, used, used + whole_lines(a.n)};
}

template <int D, class T>
static bool piece(const SelectArgs& a, const Plan& plan, const Workspace& w, int64_t l,
                  int64_t offset, int64_t m) {
  constexpr int64_t WIDTH = int64_t(sizeof(typename VectorOf<T>::type) / sizeof(T));
  const int64_t step = staged(plan.n), direct = D == F32 || D == F64 ? m / WIDTH * WIDTH : 0;
  bool bad = false;
  int64_t done = 0;
  const auto finish = [&](int64_t i, int64_t length, const T* from) {
    T* const values = const_cast<T*>(from);
    if (a.propagate) restore_nan(w.p, plan.n, length, values);
    for (int64_t k = 0; k < length; ++k) store1<D>(a.out[l], offset + i + k, values[k]);
  };
  if (direct && !a.mix_starts) {
    for (int64_t r = 0; r < plan.n; ++r)
      w.p[r] = static_cast<const char*>(a.rows[r * a.layers + l]) + int64_t(sizeof(T)) * offset;
    T* out = reinterpret_cast<T*>(static_cast<char*>(a.out[l]) + int64_t(sizeof(T)) * offset);
    const bool found = run(w.p, direct, plan, w.buffer, out);
    if (found && a.propagate) restore_nan(w.p, plan.n, direct, out);
    bad |= found;
    done = direct;
  }
  T *rows = reinterpret_cast<T*>(w.rows), *raw = reinterpret_cast<T*>(w.raw);
  for (; done < m; done += step) {
    const int64_t length = m - done < step ? m - done : step;
    const int64_t padded = (length + WIDTH - 1) / WIDTH * WIDTH;
    if (a.mix_starts)
      for (int64_t r = 0; r < a.n; ++r)
        if (w.used[r])
          stage_row<D>(a.rows[r * a.layers + l], offset + done, length, raw + r * step);
    for (int64_t r = 0; r < plan.n; ++r) {
      if (a.mix_starts)
        mix_row<4>(a, r, raw, step, padded, rows + r * step);
      else
        stage_row<D>(a.rows[r * a.layers + l], offset + done, length, rows + r * step);
      w.p[r] = reinterpret_cast<const char*>(rows + r * step);
    }
    alignas(64) T values[MAX_STAGED];
    bad |= run(w.p, padded, plan, w.buffer, values);
    finish(done, length, values);
  }
  return bad;
}

// Coordinates begin .. end - 1 of packets, in one layer or several.
static bool block(const SelectArgs& a, const Plan& plan, const Workspace& w, int64_t begin,
                  int64_t end) {
  const int64_t stride = row_stride(block_of(a));
  const void** p = reinterpret_cast<const void**>(w.packets);
  float* rows = reinterpret_cast<float*>(w.packets + whole_lines(8 * a.n));
  decode_rows(a.packets, a.n, begin, end - begin, rows, stride, rows + a.n * stride);
  bool bad = false;
  for_pieces(a.starts, a.layers, begin, end,
             [&](int64_t l, int64_t offset, int64_t first, int64_t m) {
               for (int64_t r = 0; r < a.n; ++r) p[r] = rows + r * stride + first;
               void* out = static_cast<char*>(a.out[l]) + 4 * offset;
               SelectArgs one = a;
               one.layers = 1;
               one.rows = p;
               one.out = &out;
               bad |= piece<F32, float>(one, plan, w, 0, 0, m);
             });
  return bad;
}

static int select_packets(const SelectArgs& a, const Plan& plan) {
  const int64_t size = block_of(a), total = a.starts[a.layers];
  const int64_t blocks = (total + size - 1) / size;
  int flags = 0;
  for_ranges(blocks, a.threads, [&](int64_t thread, int64_t first, int64_t last) {
    const Workspace w = workspace(a, thread);
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = b * size + size < total ? b * size + size : total;
      if (block(a, plan, w, b * size, end))
        __atomic_store_n(&flags, int(SELECT_NONFINITE), __ATOMIC_RELAXED);
    }
  });
  return a.propagate ? 0 : flags;
}

static int select(const SelectArgs& a) {
  const Plan plan{a.op, a.median, a.count, a.f, a.keep};
  if (a.packets) return select_packets(a, plan);
  a.first_tile[0] = 0;
  for (int64_t l = 0; l < a.layers; ++l)
    a.first_tile[l + 1] = a.first_tile[l] + (a.numel[l] + TILE - 1) / TILE;
  int flags = 0;
  for_ranges(a.first_tile[a.layers], a.threads, [&](int64_t thread, int64_t first, int64_t end) {
    const Workspace w = workspace(a, thread);
    for (int64_t tile = first; tile < end; ++tile) {
      const int64_t l = find_layer(a.first_tile, a.layers, tile);
      const int64_t offset = (tile - a.first_tile[l]) * TILE, rest = a.numel[l] - offset;
      const int64_t m = rest < TILE ? rest : TILE;
      bool bad = false;
      switch (a.dtype[l]) {
        case F64:
          bad = piece<F64, double>(a, plan, w, l, offset, m);
          break;
        case F32:
          bad = piece<F32, float>(a, plan, w, l, offset, m);
          break;
        case F16:
          bad = piece<F16, float>(a, plan, w, l, offset, m);
          break;
        default:
          bad = piece<BF16, float>(a, plan, w, l, offset, m);
          break;
      }
      if (bad) __atomic_store_n(&flags, int(SELECT_NONFINITE), __ATOMIC_RELAXED);
    }
  });
  return a.propagate ? 0 : flags;
}

}  // namespace FLCORE_ISA

extern const SelectFns FLCORE_TABLE(select);
const SelectFns FLCORE_TABLE(select) = {&FLCORE_ISA::select, &FLCORE_ISA::scratch_bytes};

}  // namespace flcore
