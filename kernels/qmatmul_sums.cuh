// What the threads of a block hold while they multiply a tile, and the stages they take it from
// (qmatmul.cuh): sums of products of codes until the scale changes, then sums of values.
#pragma once

#include "qmatmul.cuh"

namespace flcore {
namespace cuda {

// ---- sums of x, where a block of one scale is cut in two ----------------------------------------

// The next flush of a stretch of steps. A zero costs zero times the sum of x over the block: the
// first and the last block of a stretch may lie in it in part, and have sums of their own.
struct Flushes {
  int left;  // steps of 16 k to it
  bool first;
  const char* edges;  // in shared memory: sums of the first block, of the last one

  __device__ __forceinline__ const char* sums(const QMatmulParams& p, const char* extra, bool end) {
    const char* found = first ? edges : end ? edges + QM_THREADS : extra + p.sum_at;
    first = false;
    left = int(p.block / 16);
    return found;
  }
};

// Adds the pieces of x in [from, to) for every row of the tile.
template <class T, class Value>
__device__ __forceinline__ void sum_pieces(const QMatmulParams& p, int64_t m0, int64_t from,
                                           int64_t to, Value* shares) {
  const int row = int(threadIdx.x) % T::ROWS, share = int(threadIdx.x) / T::ROWS;
  const Value* pieces = static_cast<const Value*>(p.act_pieces) + m0 + row;
  Value sum = 0;
  if (m0 + row < p.m)
    for (int64_t i = from + share; i < to; i += QM_THREADS / T::ROWS) sum += pieces[i * p.m_pad];
  shares[threadIdx.x] = sum;
}

// Leaves sums over the first and the last block of the steps [begin, stop) in `edges`, where the
// next barrier lets them be read; EDGE_BYTES of shared memory.
template <class T, class Value>
__device__ __forceinline__ void sum_edges(const QMatmulParams& p, int64_t m0, int64_t begin,
                                          int64_t stop, char* edges) {
  const int64_t from = begin * T::K, to = stop * T::K < p.k ? stop * T::K : p.k;
  const int64_t first_end = (from / p.block + 1) * p.block, last = (to - 1) / p.block * p.block;
  const auto piece = [&](int64_t k) { return (k + p.piece - 1) / p.piece; };
  Value* shares = reinterpret_cast<Value*>(edges + 2 * QM_THREADS);
  sum_pieces<T>(p, m0, piece(from), piece(first_end < to ? first_end : to), shares);
  sum_pieces<T>(p, m0, piece(last > from ? last : from), piece(to), shares + QM_THREADS);
  __syncthreads();
  const int edge = int(threadIdx.x) / T::ROWS, row = int(threadIdx.x) % T::ROWS;
  if (edge < 2) {
    Value sum = 0;
    for (int i = row; i < QM_THREADS; i += T::ROWS) sum += shares[edge * QM_THREADS + i];
    reinterpret_cast<Value*>(edges + edge * QM_THREADS)[row] = sum;
  }
}
constexpr int EDGE_BYTES = 2 * QM_THREADS + 2 * QM_THREADS * 4;

// ---- one tile: fp16 and bf16 --------------------------------------------------------------------

template <class T>
struct FloatProduct {
  float total[T::N][T::M][4], part[T::N][T::M][4];
  Decoder<T::X, T::B> decoder[T::N];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < T::N; ++n)
#pragma unroll
      for (int m = 0; m < T::M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[n][m][i] = part[n][m][i] = 0.0f;
  }

  __device__ __forceinline__ void zeros(const QMatmulParams& p, const char* extra) {
    const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int n = 0; n < T::N; ++n) {
      const int output = (warp * T::N + n) * 16 + g;
      decoder[n].zeros(read_zero(p, extra, output), read_zero(p, extra, output + 8));
    }
  }

  __device__ __forceinline__ void flush(const QMatmulParams& p, const char* extra,
                                        const char* sums) {
    const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
#pragma unroll
    for (int n = 0; n < T::N; ++n) {
      const int output = (warp * T::N + n) * 16 + g;
      const float scale = __fmul_rn(p.unit, read_scale(p, extra, output));
      const float other = __fmul_rn(p.unit, read_scale(p, extra, output + 8));
      if (p.zero_bytes > 1) {
        const float zero = read_scale(p, extra + p.zero_at, output);
        const float next = read_scale(p, extra + p.zero_at, output + 8);
#pragma unroll
        for (int m = 0; m < T::M; ++m) {
          const float2 x = reinterpret_cast<const float2*>(sums)[4 * m + t];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float shift = __fmul_rn(i < 2 ? zero : next, i & 1 ? x.y : x.x);
            total[n][m][i] = __fadd_rn(
                total[n][m][i], __fmaf_rn(i < 2 ? scale : other, part[n][m][i], shift));
            part[n][m][i] = 0.0f;
          }
        }
      } else {
#pragma unroll
        for (int m = 0; m < T::M; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            total[n][m][i] = __fmaf_rn(i < 2 ? scale : other, part[n][m][i], total[n][m][i]);
            part[n][m][i] = 0.0f;
          }
      }
    }
  }

  __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
    if constexpr (T::X == F16)
      mma_f16(c, a, b.x, b.y);
    else
      mma_bf16(c, a, b.x, b.y);
  }

  // 16 k: `words` are those of each block of outputs, at `step` of the stage
  __device__ __forceinline__ void step(const QMatmulParams& p, const uint2* table, const char* x,
                                       int step, const uint32_t (&words)[T::N],
                                       const uint32_t (&next)[T::N]) {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    uint32_t a[T::N][4], rest[T::N][4];
    if (table) {
#pragma unroll
      for (int n = 0; n < T::N; ++n) look_up<T::B>(a[n], rest[n], table, words[n], next[n]);
    } else {
#pragma unroll
      for (int n = 0; n < T::N; ++n) decoder[n].operands(a[n], words[n], next[n]);
    }
#pragma unroll
    for (int m = 0; m < T::M; ++m) {
      const int at = x_place<T>(8 * m + g, 2 * step + (t >> 1)) + 8 * (t & 1);
      const uint2 b = *reinterpret_cast<const uint2*>(x + at);
#pragma unroll
      for (int n = 0; n < T::N; ++n) mma(part[n][m], a[n], b);
      if (p.terms > 1) {
#pragma unroll
        for (int n = 0; n < T::N; ++n) mma(part[n][m], rest[n], b);
      }
    }
  }

  __device__ __forceinline__ void stage(const QMatmulParams& p, const uint2* table,
                                        const char* stage, int steps, bool last, Flushes& next) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const char* extra = stage + T::EXTRA_AT;
    bool fresh = true;  // zeros of another group
#pragma unroll 1
    for (int piece = 0; piece < T::PIECES; ++piece) {
      uint4 words[T::N];
#pragma unroll
      for (int n = 0; n < T::N; ++n)
        words[n] = reinterpret_cast<const uint4*>(
            stage + ((warp * T::N + n) * T::PIECES + piece) * PIECE)[lane];
#pragma unroll
      for (int s = 0; s < T::STEPS; ++s) {
        const int at = piece * T::STEPS + s;
        if (at >= steps) continue;
        if (fresh && !table) zeros(p, extra);
        fresh = false;
        uint32_t word[T::N], other[T::N];
#pragma unroll
        for (int n = 0; n < T::N; ++n) {
          const uint32_t all[4] = {words[n].x, words[n].y, words[n].z, words[n].w};
          word[n] = all[T::B == 4 ? s : 2 * s];
          other[n] = all[T::B == 4 ? s : 2 * s + 1];
        }
        step(p, table, stage + T::X_AT, at, word, other);
        --next.left;
        const bool end = last && at + 1 == steps;
        if (next.left == 0 || end) {
          flush(p, extra, next.sums(p, extra, end));
          extra += p.extra_bytes;
          fresh = true;
        }
      }
    }
  }
};

// ---- one tile: int8 -----------------------------------------------------------------------------

template <class T>
struct IntProduct {
  float total[T::N][T::M][4];
  int32_t part[T::N][T::M][4], codes[T::N][4];  // codes: their sums, for activations with a zero

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < T::N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        codes[n][i] = 0;
#pragma unroll
        for (int m = 0; m < T::M; ++m) total[n][m][i] = 0.0f, part[n][m][i] = 0;
      }
  }

  __device__ __forceinline__ void flush(const QMatmulParams& p, const char* extra,
                                        const char* sums) {
    const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
    const bool floating = p.zero_bytes > 1;
#pragma unroll
    for (int n = 0; n < T::N; ++n) {
      const int output = (warp * T::N + n) * 16 + g;
      const float scale[2] = {read_scale(p, extra, output), read_scale(p, extra, output + 8)};
      const int zero[2] = {read_zero(p, extra, output), read_zero(p, extra, output + 8)};
      float shift[2] = {0.0f, 0.0f};
      if (floating) {
        shift[0] = read_scale(p, extra + p.zero_at, output);
        shift[1] = read_scale(p, extra + p.zero_at, output + 8);
      }
#pragma unroll
      for (int m = 0; m < T::M; ++m) {
        const int column = 8 * m + 2 * t;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float sx = reinterpret_cast<const float*>(extra + p.act_at)[column + (i & 1)];
          const int sum = reinterpret_cast<const int*>(sums)[column + (i & 1)];
          int found = part[n][m][i] - zero[i >> 1] * sum;
          if (p.act_zero)
            found -= reinterpret_cast<const int*>(extra + p.shift_at)[column + (i & 1)] *
                     codes[n][i & 2];
          float y = __fmaf_rn(__fmul_rn(sx, scale[i >> 1]), float(found), total[n][m][i]);
          if (floating) y = __fmaf_rn(__fmul_rn(sx, shift[i >> 1]), float(sum), y);
          total[n][m][i] = y;
          part[n][m][i] = 0;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[n][i] = 0;
    }
  }

  // 32 k, or half `h` of them.
  __device__ __forceinline__ void multiply(const QMatmulParams& p, const uint32_t (&a)[T::N][4],
                                           const uint32_t (&b)[T::M][2], bool halves, int h) {
    constexpr uint32_t ONES = 0x01010101u;
#pragma unroll
    for (int n = 0; n < T::N; ++n) {
      if (halves) {
        const uint32_t row = h ? a[n][2] : a[n][0], other = h ? a[n][3] : a[n][1];
#pragma unroll
        for (int m = 0; m < T::M; ++m)
          mma_u8s8_half(part[n][m], row, other, h ? b[m][1] : b[m][0]);
        if (p.act_zero) mma_u8s8_half(codes[n], row, other, ONES);
      } else {
#pragma unroll
        for (int m = 0; m < T::M; ++m) mma_u8s8(part[n][m], a[n], b[m][0], b[m][1]);
        if (p.act_zero) mma_u8s8(codes[n], a[n], ONES, ONES);
      }
    }
  }

  __device__ __forceinline__ void stage(const QMatmulParams& p, const uint2*, const char* stage,
                                        int steps, bool last, Flushes& next) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const char* extra = stage + T::EXTRA_AT;
    const bool halves = p.block % 32 != 0;
#pragma unroll 1
    for (int piece = 0; piece < T::PIECES; ++piece) {
      uint4 words[T::N];
#pragma unroll
      for (int n = 0; n < T::N; ++n)
        words[n] = reinterpret_cast<const uint4*>(
            stage + ((warp * T::N + n) * T::PIECES + piece) * PIECE)[lane];
#pragma unroll
      for (int s = 0; s < T::STEPS; s += 2) {
        int done = piece * T::STEPS + s;
        if (done >= steps) continue;
        uint32_t a[T::N][4], b[T::M][2];
#pragma unroll
        for (int n = 0; n < T::N; ++n) {
          const uint32_t all[4] = {words[n].x, words[n].y, words[n].z, words[n].w};
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[n][i] = T::B == 8 ? all[i] : all[s + (i >> 1)] >> (4 * (i & 1)) & 0x0f0f0f0fu;
        }
#pragma unroll
        for (int m = 0; m < T::M; m += 2) {
          uint32_t r[4];
          const int row = 8 * (m + (lane >> 4)) + (lane & 7), part_of_row = done + (lane >> 3 & 1);
          load_matrices(r, stage + T::X_AT + x_place<T>(row, part_of_row));
          b[m][0] = r[0], b[m][1] = r[1], b[m + 1][0] = r[2], b[m + 1][1] = r[3];
        }
#pragma unroll 1
        for (int h = 0; h < (halves ? 2 : 1) && done < steps; ++h) {
          multiply(p, a, b, halves, h);
          done += halves ? 1 : 2;
          next.left -= halves ? 1 : 2;
          const bool end = last && done >= steps;
          if (next.left != 0 && !end) continue;
          flush(p, extra, next.sums(p, extra, end));
          extra += p.extra_bytes;
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace flcore
