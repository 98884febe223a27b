// y = x W^T + bias + low up^T with W in 2, 3, 4 or 8 bits (layout tile16, csrc/api.h), x in
// float32, float16 or bfloat16, sums in float32:
//   y[m][n] = sum over groups of S[n] (sum x q' - (Z[n] - c) sum x),   q' = q - c, c = 2^(b - 1)
// and S sum x table[q] for levels. W is read once and never written: up to 8 rows of x multiply
// codes that are decoded in registers (qmatmul_direct.h), more rows a panel in cache
// (qmatmul_panel.h); bfloat16 x by pairs where the processor has their products (qmatmul_bf16.h),
// up to four rows of other x as digits of 8 bits (qmatmul_limbs.h).
//
// Count: n k b / 8 bytes of codes and 16 + 4 zeros bits a group, 0.52 bytes a weight at 4 bits in
// groups of 128. On Zen 4, at one instruction of 512 bits a cycle and unit, the 128 weights of 64
// bytes of 4-bit codes take 7 cycles for a row of bfloat16 (4 vpermw and 3 shifts on one unit, 4
// products on the other), 8 for a row of float32 (8 products of digits), 16 where float32 is
// multiplied as such: 34, 30 and 15 GB/s a core at 3.7 GHz; memory gives each of two about 20.
//
// A row of x one-hot with 1 gives the column of W as float32 has it; whole numbers are exact below
// 2^24. Blocks of 16 rows of W are independent, so threads share them in any number for the same
// bits. x beyond the finite gives rows that are not finite. Sources: AWQ (arXiv 2306.00978), FLUTE
// (arXiv 2407.10960) for decoding by lookup, MARLIN (arXiv 2408.11743) for scales after the sum.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_bf16.h"
#include "cpu/qmatmul_decode.h"
#include "cpu/qmatmul_direct.h"
#include "cpu/qmatmul_limbs.h"
#include "cpu/qmatmul_panel.h"
#include "cpu/qmatmul_rows.h"
#include "cpu/scratch.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

// Which kernel a call gets.
struct Route {
  Cut cut;
  int code, base;
  bool direct, sums;
  bool pairs, limbs;  // the kernels of qmatmul_bf16.h and qmatmul_limbs.h
  int64_t rows;       // of the packed x at a time
  int64_t row_bytes;  // of the packed x
};

int code_of(const QWeight& w) {
  if (w.kind == QW_E4M3 || w.kind == QW_E5M2) return FP8;
  if (w.bits == 2) return INT2;
  if (w.bits == 3) return INT3;
  if (w.bits == 8) return INT8;
#if !defined(__AVX512F__)
  if (w.kind == QW_TABLE) return TABLE4;
#endif
  return INT4;
}

Route route_of(const QMatmulArgs& a) {
  Route r = {};
  const QWeight& w = a.w;
  r.cut = cut_of(w);
  r.code = code_of(w);
  r.direct = a.m <= DIRECT_ROWS;
  r.rows = r.direct ? direct_rows(a.m) : a.m < BATCH ? a.m : BATCH;
  const bool whole = w.kind == QW_INT || w.kind == QW_FLOAT_ZERO;
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  r.limbs = whole && a.m <= LIMB_ROWS && (a.x_dtype != BF16 || w.bits == 8);
  r.pairs = !r.limbs && a.x_dtype == BF16 && !(r.direct && r.code == INT8);
#endif
  r.base = !whole              ? 0
           : r.pairs           ? 1 << (w.bits - 1)
           : r.code == INT2    ? code_base(INT2)
           : r.code == INT3    ? code_base(INT3)
           : r.code == INT4    ? code_base(INT4)
                               : code_base(INT8);
  r.sums = (r.direct || r.pairs) && needs_sums(w, r.base);
  r.row_bytes = r.cut.halves * HALF * (r.pairs ? 2 : 4);
  return r;
}

#if defined(__AVX512VNNI__)
constexpr int64_t LIMB_BYTES = sizeof(LimbSums);
#else
constexpr int64_t LIMB_BYTES = 0;
#endif

// Working memory: levels, packed x, sums of its segments, then a part for each thread.
struct Parts {
  int64_t x, sums, threads, each, all;
};

Parts parts_of(const QMatmulArgs& a, const Route& r) {
  Parts p;
  p.x = whole_lines(sizeof(Levels));
  p.sums = p.x + whole_lines(r.rows * r.row_bytes);
  const int64_t each = r.limbs ? LIMB_BYTES : r.sums ? 4 : 0;
  p.threads = p.sums + whole_lines(each * r.rows * r.cut.segments);
  p.each = whole_lines(r.direct ? 4 * ROWS * a.rank : panel_scratch(a));
  p.all = p.threads + p.each * a.threads;
  return p;
}

int64_t scratch(const QMatmulArgs& a) { return parts_of(a, route_of(a)).all; }

// Blocks first .. of count, in one contiguous part a thread: body(block, scratch of the thread).
template <class Body>
void share(int64_t count, int threads, char* memory, int64_t each, const Body& body) {
  for_ranges(count, threads, [&](int64_t t, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) body(i, memory + t * each);
  });
}

void run_direct(const QMatmulArgs& a, const Route& r, const Parts& parts, char* memory) {
  const Levels& levels = *reinterpret_cast<Levels*>(memory);
  const int rows = int(r.rows);
  DirectBlock block = direct_kernel(r.code, rows);
  PackRows pack = pack_kernel(r.code);
  float* const x = reinterpret_cast<float*>(memory + parts.x);
  float* sums = r.sums || r.limbs ? reinterpret_cast<float*>(memory + parts.sums) : nullptr;
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  if (r.pairs) {
    block = direct_pairs_kernel(r.code, rows);
    pack = pack_pairs_kernel(r.code);
  }
  if (r.limbs) {
    block = direct_limbs_kernel(r.code, rows);
    pack_limbs(a, r.cut, rows, reinterpret_cast<uint32_t*>(x), reinterpret_cast<LimbSums*>(sums));
  }
#endif
  if (!r.limbs) pack(a, r.cut, 0, a.m, rows, x);
  if (!r.limbs && sums) {
    __builtin_memset(sums, 0, size_t(4 * rows * r.cut.segments));
    segment_sums(a, r.cut, 0, a.m, rows, sums);
  }
  const Direct d{&a, r.cut, &levels, x, sums, r.base};
  share(r.cut.blocks, a.threads, memory + parts.threads, parts.each,
        [&](int64_t b, char* own) { block(d, b, reinterpret_cast<float*>(own)); });
}

void run_panels(const QMatmulArgs& a, const Route& r, const Parts& parts, char* memory) {
  Panel panel = panel_kernel(r.code);
  PackRows pack = pack_kernel(r.code);
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  if (r.pairs) {
    panel = panel_pairs_kernel(r.code);
    pack = pack_pairs_kernel(r.code);
  }
#endif
  char* x = memory + parts.x;
  float* sums = r.sums ? reinterpret_cast<float*>(memory + parts.sums) : nullptr;
  const int64_t panels = (r.cut.blocks + PANEL_BLOCKS - 1) / PANEL_BLOCKS;
  for (int64_t first = 0; first < a.m; first += BATCH) {
    const Tiles tiles = Tiles::of(first, a.m - first < BATCH ? a.m - first : BATCH);
    for_chunks(tiles.count, a.threads, [&](int64_t t) {
      const int64_t start = tiles.start(t), size = tiles.size(t);
      pack(a, r.cut, first + start, size, size,
           reinterpret_cast<float*>(x + start * r.row_bytes));
      if (sums) segment_sums(a, r.cut, first + start, size, size, sums + start * r.cut.segments);
    });
    const Batch batch{&a,   r.cut,  reinterpret_cast<Levels*>(memory), tiles, x, r.row_bytes,
                      sums, r.base};
    share(panels, a.threads, memory + parts.threads, parts.each,
          [&](int64_t p, char* own) { panel(batch, p * PANEL_BLOCKS, own); });
  }
}

void run(const QMatmulArgs& a) {
  const Route r = route_of(a);
  const Parts parts = parts_of(a, r);
  char* memory = static_cast<char*>(a.scratch);
  make_levels(a.w, reinterpret_cast<Levels*>(memory));
  if (r.direct)
    run_direct(a, r, parts, memory);
  else
    run_panels(a, r, parts, memory);
}

}  // namespace
}  // namespace FLCORE_ISA

extern const QMatmulFns FLCORE_TABLE(qmatmul);
const QMatmulFns FLCORE_TABLE(qmatmul) = {&FLCORE_ISA::run, &FLCORE_ISA::scratch};

}  // namespace flcore
