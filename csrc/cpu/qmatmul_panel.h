// Many rows of x: a panel of W is decoded into cache, scaled, as float32, and multiplied with tiles
// of rows that lie there too.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/qmatmul_decode.h"
#include "cpu/qmatmul_rows.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int PANEL_VECTORS = LANES == 16 ? 4 : LANES == 8 ? 2 : 4;
constexpr int PANEL_COLUMNS = PANEL_VECTORS * LANES;  // rows of W side by side: 64, 16, 16
constexpr int PANEL_BLOCKS = PANEL_COLUMNS / ROWS;
constexpr int TILE_ROWS = LANES == 4 ? 2 : 6;         // rows of x whose sums fit in the registers
constexpr int64_t PANEL_HALVES = 8;                   // 128 k of a panel of float32 at once
constexpr int64_t PANEL_FLOATS = PANEL_HALVES * HALF * PANEL_COLUMNS;  // or pairs of bfloat16
constexpr int64_t BATCH = 240;                        // rows of x for which a panel is decoded once

// Rows of a batch in tiles that are as even as they can be.
struct Tiles {
  int64_t first, count, rows, tall;  // `tall` tiles of `rows`, the others have one less
  static FLCORE_MEMBER Tiles of(int64_t first, int64_t rows) {
    const int64_t count = (rows + TILE_ROWS - 1) / TILE_ROWS, least = rows / count;
    const int64_t more = rows - least * count;
    return Tiles{first, count, more ? least + 1 : least, more ? more : count};
  }
  FLCORE_MEMBER int64_t start(int64_t t) const {  // within the batch
    return t <= tall ? t * rows : tall * rows + (t - tall) * (rows - 1);
  }
  FLCORE_MEMBER int size(int64_t t) const { return int(t < tall ? rows : rows - 1); }
};

// What a batch has in common.
struct Batch {
  const QMatmulArgs* a;
  Cut cut;
  const Levels* levels;
  Tiles tiles;
  const char* x;      // packed: tile t of R rows from start(t) * row_bytes on
  int64_t row_bytes;
  const float* sums;  // [tile: start(t) * segments][segments][R], or null
  int base;
};

// Panel of floats: to[j-th k][column], w as it stands for.
template <int CODE>
static void decode_panel(const Batch& q, int64_t b, int64_t h, int64_t end, float* to) {
  const QWeight& w = q.a->w;
  const bool float_zero = LANES == 4 ? w.kind == QW_FLOAT_ZERO : true;  // same bits, other cost
  for (int i = 0; i < PANEL_BLOCKS; ++i) {
    float* column = to + i * ROWS;
    if (b + i >= q.cut.blocks) {
      for (int64_t k = 0; k < (end - h) * HALF; ++k)
        for (int p = 0; p < PARTS; ++p) store(column + k * PANEL_COLUMNS + p * LANES, vf32{});
      continue;
    }
    const uint8_t* codes = block_codes(w, b + i);
    int64_t group = -1;
    GroupRows g = {};
    for (int64_t at = h; at < end; ++at) {
      const int64_t own = at / q.cut.group < q.cut.groups ? at / q.cut.group : q.cut.groups - 1;
      if (own != group) g = group_rows(w, q.base, (b + i) * q.cut.groups + (group = own));
      float* rows = column + (at - h) * HALF * PANEL_COLUMNS;
      prefetch(half_codes(codes, code_bits(CODE), at), 32 * code_bits(CODE));
      decode_half<CODE>(codes, at, *q.levels, [&](auto jc, const Rows& v) FLCORE_LAMBDA {
        for (int p = 0; p < PARTS; ++p) {
          const vf32 t = v.v[p] - g.offset.v[p];
          store(rows + decltype(jc)::value * PANEL_COLUMNS + p * LANES,
                float_zero ? fused(t, g.scale.v[p], g.zero.v[p]) : t * g.scale.v[p]);
        }
      });
    }
  }
}

// total[r][column] += sum over k of x[k][r] panel[k][column]
template <int R>
static void tile_product(const float* x, const float* panel, int64_t k, float* total) {
  vf32 sum[R][PANEL_VECTORS];
  unroll<R * PANEL_VECTORS>([&](auto ic) FLCORE_LAMBDA {
    constexpr int r = decltype(ic)::value / PANEL_VECTORS, c = decltype(ic)::value % PANEL_VECTORS;
    sum[r][c] = load<vf32>(total + r * PANEL_COLUMNS + c * LANES);
  });
  for (int64_t i = 0; i < k; ++i) {
    vf32 w[PANEL_VECTORS];
    unroll<PANEL_VECTORS>([&](auto cc) FLCORE_LAMBDA {
      constexpr int c = decltype(cc)::value;
      w[c] = load<vf32>(panel + i * PANEL_COLUMNS + c * LANES);
    });
    unroll<R>([&](auto rc) FLCORE_LAMBDA {
      constexpr int r = decltype(rc)::value;
      const vf32 xv = vf32{} + x[i * R + r];
      unroll<PANEL_VECTORS>([&](auto cc) FLCORE_LAMBDA {
        constexpr int c = decltype(cc)::value;
        sum[r][c] = mac(xv, w[c], sum[r][c]);
      });
    });
  }
  unroll<R * PANEL_VECTORS>([&](auto ic) FLCORE_LAMBDA {
    constexpr int r = decltype(ic)::value / PANEL_VECTORS, c = decltype(ic)::value % PANEL_VECTORS;
    store(total + r * PANEL_COLUMNS + c * LANES, sum[r][c]);
  });
}

// `rows` rows by the kernel that is built for them.
FLCORE_INLINE void tile_products(int rows, const float* x, const float* panel, int64_t k,
                                 float* total) {
  if constexpr (TILE_ROWS > 2) {
    if (rows == 6) return tile_product<6>(x, panel, k, total);
    if (rows == 5) return tile_product<5>(x, panel, k, total);
    if (rows == 4) return tile_product<4>(x, panel, k, total);
    if (rows == 3) return tile_product<3>(x, panel, k, total);
  }
  if (rows == 2) return tile_product<2>(x, panel, k, total);
  tile_product<1>(x, panel, k, total);
}

// Bytes that one thread needs: the panel, sums, columns of up, numbers of a group.
FLCORE_INLINE int64_t panel_scratch(const QMatmulArgs& a) {
  const int64_t rows = a.m < BATCH ? a.m : BATCH;
  return 4 * (PANEL_FLOATS + PANEL_COLUMNS * (rows + a.rank + 3));
}

struct PanelParts {
  float *panel, *total, *up, *group;
  static FLCORE_MEMBER PanelParts of(const QMatmulArgs& a, char* scratch) {
    const int64_t rows = a.m < BATCH ? a.m : BATCH;
    float* panel = reinterpret_cast<float*>(scratch);
    float* total = panel + PANEL_FLOATS;
    float* up = total + PANEL_COLUMNS * rows;
    return PanelParts{panel, total, up, up + PANEL_COLUMNS * a.rank};
  }
};

static void finish_panel(const Batch& q, int64_t b, const PanelParts& parts) {
  const QMatmulArgs& a = *q.a;
  const int64_t blocks = q.cut.blocks - b < PANEL_BLOCKS ? q.cut.blocks - b : PANEL_BLOCKS;
  for (int64_t i = 0; i < blocks && a.rank; ++i)
    turn_up(a, (b + i) * ROWS, ROWS, parts.up + i * ROWS * a.rank);
  const int64_t rows = q.tiles.start(q.tiles.count);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < blocks; ++i)
      finish_rows(a, q.tiles.first + r, (b + i) * ROWS,
                  load_rows<F32>(parts.total, r * PANEL_COLUMNS + i * ROWS),
                  parts.up + i * ROWS * a.rank);
}

template <int CODE>
static void panel_floats(const Batch& q, int64_t b, char* scratch) {
  const PanelParts parts = PanelParts::of(*q.a, scratch);
  const int64_t rows = q.tiles.start(q.tiles.count);
  __builtin_memset(parts.total, 0, size_t(4 * rows * PANEL_COLUMNS));
  for (int64_t h = 0; h < q.cut.halves; h += PANEL_HALVES) {
    const int64_t end = h + PANEL_HALVES < q.cut.halves ? h + PANEL_HALVES : q.cut.halves;
    decode_panel<CODE>(q, b, h, end, parts.panel);
    for (int64_t t = 0; t < q.tiles.count; ++t) {
      const int size = q.tiles.size(t);
      const float* x = reinterpret_cast<const float*>(q.x + q.tiles.start(t) * q.row_bytes);
      tile_products(size, x + h * HALF * size, parts.panel, (end - h) * HALF,
                    parts.total + q.tiles.start(t) * PANEL_COLUMNS);
    }
  }
  finish_panel(q, b, parts);
}

typedef void (*Panel)(const Batch&, int64_t, char*);

static Panel panel_kernel(int code) {
  switch (code) {
    case INT2: return panel_floats<INT2>;
    case INT3: return panel_floats<INT3>;
    case INT4: return panel_floats<INT4>;
    case INT8: return panel_floats<INT8>;
#if !defined(__AVX512F__)
    case TABLE4: return panel_floats<TABLE4>;
#endif
    default: return panel_floats<FP8>;
  }
}

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
