// Tiles of a product with a weight in few bits, shared by the kernels of qmatmul.cu: how codes lie
// in memory, what a stage of the ring in shared memory holds, how a lane turns codes into operands.
//
// Fragment order of the codes. The weight is the first operand of mma, 16 rows by 16 k, and a lane
// (g, t) = (lane / 4, lane % 4) takes rows g, g + 8 and k = 4t .. 4t + 3 of every 16 k: the order
// of a contraction is free, and with this one a lane's activations are 8 bytes side by side, and
// codes of 8 bits are the operand of an integer product as they are. A piece of 512 bytes is 16
// bytes a lane, words 0 .. 3:
//   4 bits: 16 rows x 64 k, a word for each 16 k: nibble p is row g + 8 (p % 2),
//           k = 4t + (p / 4) + 2 (p / 2 % 2)
//   8 bits: 16 rows x 32 k, two words for each 16 k, rows g and g + 8: byte i is k = 4t + i
// Pieces of a block of 16 rows follow each other; K is padded to 64 with code 0 (and x with 0).
// Scales and zeros keep the order [blocks][groups][16].
#pragma once

#include "check.h"
#include "launch.h"
#include "ptx.cuh"
#include "row_table.cuh"

namespace flcore {
namespace cuda {

constexpr int QM_THREADS = 256, QM_WARPS = 8;
constexpr int PIECE = 512;        // bytes
constexpr int LOOKUP_COPIES = 16;  // of a lookup table: lanes of a half-warp meet different banks

extern __shared__ uint4 shared_words[];

// Sizes of a tile: X dtype of the activations (F16, BF16, I8), B bits of a code, and a warp's 16 N
// outputs by 8 M rows of x, over K positions at a time.
template <int X_, int B_, int M_, int N_, int K_>
struct Tile {
  static constexpr int X = X_, B = B_, M = M_, N = N_, K = K_;
  static constexpr int ROWS = 8 * M, OUTPUTS = 16 * N * QM_WARPS;
  static constexpr int BLOCKS = N * QM_WARPS;        // of 16 outputs
  static constexpr int ITEM = X == I8 ? 1 : 2;       // bytes of an activation
  static constexpr int ROW = K * ITEM;               // bytes of a row of x
  static constexpr int PIECE_K = 256 / B;            // k of a piece
  static constexpr int PIECES = K / PIECE_K;         // of a block of outputs
  static constexpr int STEPS = PIECE_K / 16;         // of 16 k in a piece
  static constexpr int X_AT = BLOCKS * PIECES * PIECE;  // a stage: codes, x, then what `Extra` says
  static constexpr int EXTRA_AT = X_AT + ROWS * ROW;
};

// What a launch needs, by value. A flush ends `block` positions k that share scales: then sums of
// codes become sums of values.
struct QMatmulParams {
  int64_t m, n, k;
  const uint8_t* codes;
  int64_t pieces;            // of a block of 16 outputs
  const uint8_t *scales, *zeros;
  int64_t groups;            // scales of an output
  int scale_dtype, scale_bytes, zero_bytes;  // zero_bytes 0: none; 1: integers; else floating
  int middle;                // zero of the codes where none is given
  const uint2* lookup;       // [256] or null: what a byte of codes stands for, as two terms
  int terms;                 // of the lookup that are not zero
  float unit;                // of its values
  const uint8_t* x;
  int64_t x_stride;          // bytes
  int64_t width;             // k, and the padding of quantised activations: it holds their zero
  int64_t block, blocks;     // positions of a flush, and how many there are
  int scale_every;           // flushes a scale lasts
  int act_every;             // flushes a scale of x lasts
  const float* act_scale;    // [..][m_pad], I8
  const void* act_sum;       // [blocks][m_pad]: float32 of x for floating zeros, int32 of codes
  const void* act_pieces;    // [..][m_pad]: the same of `piece` positions, for blocks cut in two
  int piece;
  const int32_t* act_zero;   // as act_scale, or null
  int64_t m_pad;             // rows of x, up to a multiple of 64
  int extra_bytes, zero_at, act_at, sum_at, shift_at;  // of the extras of a flush in a stage
  int stages, stage_bytes;
  int64_t n_tiles, m_tiles, k_tiles, grid;
  float4* partial;           // [2 grid][M N][threads]
  void* y;
  int64_t y_stride;
  int y_dtype;
  const float *bias, *low, *up;
  int64_t rank;
};

// What the kernels of qmatmul_prepare.cu make of x [m, k]. Every sum is [..][m_pad].
struct QActArgs {
  const void* x;
  int x_dtype;
  int64_t x_stride;           // elements
  int64_t m, k, m_pad;
  int64_t act_block, block;   // positions of a scale of x, and of a sum, which divides it
  int64_t piece;              // positions of a piece of a sum, which divides `block`
  bool swap, asymmetric;
  int8_t* codes;              // [m][k up to a multiple of 64]
  float* scales;              // [..][m_pad]
  int32_t* zeros;             // as scales, for asymmetric codes
  void *sums, *piece_sums;    // int32 for codes, else float32
};
void launch_qmatmul_activations(const QActArgs& a, cudaStream_t stream);
void launch_qmatmul_row_sums(const QActArgs& a, cudaStream_t stream);

// ---- work: every block of threads takes an even share of all tiles of all K ---------------------

__host__ __device__ inline int64_t first_step(const QMatmulParams& p, int64_t block) {
  return block * (p.n_tiles * p.m_tiles * p.k_tiles) / p.grid;
}
// A block has two places for sums over a part of K: 0 where another one has begun the tile, else 1.
__host__ __device__ inline int64_t partial_slot(const QMatmulParams& p, int64_t block,
                                                int64_t tile) {
  return 2 * block + (first_step(p, block) <= tile * p.k_tiles ? 1 : 0);
}

// ---- a stage of the ring ------------------------------------------------------------------------

// Places of 16 bytes in a row of x move with the row, so that the lanes of a load meet all banks.
template <class T>
__device__ __forceinline__ int x_place(int row, int part) {
  if constexpr (T::X != I8)
    return row * T::ROW + ((part ^ (2 * (row & 3))) << 4);
  else if constexpr (T::ROW >= 128)
    return row * T::ROW + ((part ^ (row & 7)) << 4);
  else
    return row * T::ROW + ((part ^ ((row >> 1) & 3)) << 4);
}

template <class T>
struct Stager {
  const QMatmulParams& p;
  int64_t n0, m0;  // of the tile: first block of outputs, first row
  uint64_t policy;

  // values of [blocks][count][16] for each flush of the stage
  __device__ void outputs(char* dst, const uint8_t* src, int bytes, int64_t first,
                          int flushes) const {
    const int each = T::BLOCKS * bytes;  // 16 bytes at a time
    const int64_t last = (p.n + 15) / 16;
    for (int i = int(threadIdx.x); i < flushes * each; i += QM_THREADS) {
      const int flush = i / each, block = i % each / bytes, part = i % each % bytes;
      const int64_t from = (first + flush) / p.scale_every;
      const bool there = n0 + block < last;
      const int64_t at = there ? ((n0 + block) * p.groups + from) * 16 * bytes + part * 16 : 0;
      copy_async(dst + flush * p.extra_bytes + (i % each) * 16, src + at, there ? 16 : 0);
    }
  }
  // values of [..][m_pad] for each flush of the stage
  __device__ void rows(char* dst, const void* src, int64_t every, int64_t first,
                       int flushes) const {
    constexpr int each = T::ROWS / 4;
    for (int i = int(threadIdx.x); i < flushes * each; i += QM_THREADS) {
      const int flush = i / each, part = i % each;
      const int64_t at = ((first + flush) / every * p.m_pad + m0) * 4 + part * 16;
      const int64_t left = p.m - m0 - part * 4;
      copy_async(dst + flush * p.extra_bytes + part * 16, static_cast<const char*>(src) + at,
                 left <= 0 ? 0 : left < 4 ? int(left) * 4 : 16);
    }
  }

  __device__ void operator()(char* stage, int64_t step) const {
    constexpr int CODES = T::X_AT / 16, OF_BLOCK = T::PIECES * PIECE / 16;
#pragma unroll
    for (int i = int(threadIdx.x); i < CODES; i += QM_THREADS) {
      const int block = i / OF_BLOCK, part = i % OF_BLOCK;
      const int64_t piece = step * T::PIECES + part / (PIECE / 16);
      const bool there = (n0 + block) * 16 < p.n && piece < p.pieces;
      const int64_t at = (n0 + block) * p.pieces * PIECE + step * (T::PIECES * PIECE) + part * 16;
      copy_async(stage + i * 16, p.codes + (there ? at : 0), there ? 16 : 0, policy);
    }
    constexpr int PARTS = T::ROW / 16, X_PARTS = T::ROWS * PARTS;
#pragma unroll
    for (int i = int(threadIdx.x); i < X_PARTS; i += QM_THREADS) {
      const int row = i / PARTS, part = i % PARTS;
      const int64_t left = (p.width - step * T::K) * T::ITEM - part * 16;  // bytes of the row
      const int bytes = m0 + row >= p.m || left <= 0 ? 0 : left < 16 ? int(left) : 16;
      const int64_t at = (m0 + row) * p.x_stride + step * T::ROW + part * 16;
      copy_async(stage + T::X_AT + x_place<T>(row, part), p.x + (bytes ? at : 0), bytes);
    }
    char* extra = stage + T::EXTRA_AT;
    const int64_t first = step * T::K / p.block, end = step * T::K + T::K;
    const int64_t last = (end < p.k ? end - 1 : p.k - 1) / p.block;
    const int flushes = int(last - first) + 1;
    outputs(extra, p.scales, p.scale_bytes, first, flushes);
    if (p.zero_bytes) outputs(extra + p.zero_at, p.zeros, p.zero_bytes, first, flushes);
    if (T::X == I8) rows(extra + p.act_at, p.act_scale, p.act_every, first, flushes);
    if (p.act_sum) rows(extra + p.sum_at, p.act_sum, 1, first, flushes);
    if (T::X == I8 && p.act_zero) rows(extra + p.shift_at, p.act_zero, p.act_every, first, flushes);
  }
};

__device__ __forceinline__ void wait_for_stage(int stages) {  // the oldest of stages - 1
  if (stages == 4)
    copy_wait<2>();
  else if (stages == 3)
    copy_wait<1>();
  else
    copy_wait<0>();
}

// ---- scales and zeros ---------------------------------------------------------------------------

__device__ __forceinline__ float read_scale(const QMatmulParams& p, const char* values,
                                            int output) {
  if (p.scale_dtype == F32) return reinterpret_cast<const float*>(values)[output];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(values)[output];
  return p.scale_dtype == F16 ? widen<F16, float>(bits) : widen<BF16, float>(bits);
}

// The integer zero of an output.
__device__ __forceinline__ int read_zero(const QMatmulParams& p, const char* extra, int output) {
  return p.zero_bytes == 1 ? int(reinterpret_cast<const uint8_t*>(extra + p.zero_at)[output])
                           : p.middle;
}

// ---- codes to operands --------------------------------------------------------------------------

__device__ __forceinline__ uint32_t twice(uint32_t low) { return low | low << 16; }

// Integer codes less their zero as pairs of X. Codes are put below the leading bits of a number
// whose last place is 1 (fp16 1024 = 0x6400, bf16 128 = 0x4300, fp32 2^23), which is subtracted
// together with the zero: exact, and no conversion. A nibble one place higher counts 16 times.
template <int X, int B>
struct Decoder {
  uint32_t first, second;  // what is subtracted in rows g and g + 8

  __device__ __forceinline__ void zeros(int zero, int other) {
    if constexpr (X == F16) {
      first = twice(0x6400u + uint32_t(zero));
      second = twice(B == 8 ? 0x6400u + uint32_t(other) : narrow<F16>(-64.0f - float(other)));
    } else if constexpr (B == 4) {
      first = twice(bf16_bits(-128.0f - float(zero)));
      second = twice(bf16_bits(-128.0f - float(other)));
    } else {
      first = __float_as_uint(8388608.0f + float(zero));
      second = __float_as_uint(8388608.0f + float(other));
    }
  }

  // a: rows g and g + 8 of k = 4t, 4t + 1, then of 4t + 2, 4t + 3
  __device__ __forceinline__ void operands(uint32_t (&a)[4], uint32_t word, uint32_t next) const {
    if constexpr (X == F16 && B == 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t q = word >> (8 * half);
        a[2 * half] = sub_f16x2((q & 0x000f000fu) | 0x64006400u, first);
        a[2 * half + 1] = fma_f16x2((q & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, second);
      }
    } else if constexpr (B == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = fma_bf16x2((word >> (4 * i) & 0x000f000fu) | 0x43004300u, 0x3f803f80u,
                          i & 1 ? second : first);
    } else if constexpr (X == F16) {
      a[0] = sub_f16x2(__byte_perm(word, 0x64646464u, 0x4140), first);
      a[1] = sub_f16x2(__byte_perm(next, 0x64646464u, 0x4140), second);
      a[2] = sub_f16x2(__byte_perm(word, 0x64646464u, 0x4342), first);
      a[3] = sub_f16x2(__byte_perm(next, 0x64646464u, 0x4342), second);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t q = i & 1 ? next : word;
        const float zero = __uint_as_float(i & 1 ? second : first);
        const float low = __uint_as_float(__byte_perm(q, 0x4b000000u, i < 2 ? 0x7440 : 0x7442));
        const float high = __uint_as_float(__byte_perm(q, 0x4b000000u, i < 2 ? 0x7441 : 0x7443));
        a[i] = pack_bf16x2(__fsub_rn(low, zero), __fsub_rn(high, zero));
      }
    }
  }
};

// The same through a table in shared memory: of pairs of nibbles, or of bytes. A value is the sum
// of two of X, because a level of a codebook has more digits than one.
template <int B>
__device__ __forceinline__ void look_up(uint32_t (&a)[4], uint32_t (&rest)[4], const uint2* table,
                                        uint32_t word, uint32_t next) {
  const uint2* mine = table + (threadIdx.x & (LOOKUP_COPIES - 1));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (B == 4) {
      const uint32_t pair = word >> (4 * i) & 0x000f000fu;
      const uint2 found = mine[((pair | pair >> 12) & 0xffu) * LOOKUP_COPIES];
      a[i] = found.x;
      rest[i] = found.y;
    } else {
      const uint32_t q = (i & 1 ? next : word) >> (i < 2 ? 0 : 16);
      const uint2 low = mine[(q & 0xffu) * LOOKUP_COPIES];
      const uint2 high = mine[(q >> 8 & 0xffu) * LOOKUP_COPIES];
      a[i] = __byte_perm(low.x, high.x, 0x5410);
      rest[i] = __byte_perm(low.y, high.y, 0x5410);
    }
  }
}

}  // namespace cuda
}  // namespace flcore
