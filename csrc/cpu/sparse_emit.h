// Entries of a tile into the sections of a sparse packet, and the new state where they were sent.
// Writes 2 bytes an index or a bit a coordinate (other index codings: csrc/indices.cpp), and the value;
// touches e, h, v at the entries only.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/feedback.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "sections are written as stored");

// Writes the value in its wire dtype and returns what a receiver reads. Finite values that would
// round to infinity become the largest finite value; the residual keeps the rest.
template <int D>
FLCORE_INLINE float put_value(void* values, int64_t j, float u) {
  if (D == F32) {
    store(static_cast<char*>(values) + 4 * j, u);
    return u;
  }
  uint16_t raw = D == F16 ? f32_to_f16(u) : f32_to_bf16(u);
  const uint16_t infinite = D == F16 ? 0x7c00u : 0x7f80u;
  if ((raw & 0x7fffu) == infinite) --raw;
  store(static_cast<char*>(values) + 2 * j, raw);
  return D == F16 ? f16_to_f32(raw) : bf16_to_f32(raw);
}

template <int D>
static void put_values(void* values, int64_t first, int64_t count, const float* u, float* sent) {
  for (int64_t j = 0; j < count; ++j) sent[j] = put_value<D>(values, first + j, u[j]);
}

// The float32 that int8 codes of a tile multiply: the largest magnitude takes code 127. No code may
// decode to more than WIRE_LARGEST.
FLCORE_INLINE float int8_scale(const float* u, int64_t count) {
  float top = 0;
  for (int64_t j = 0; j < count; ++j) {
    const float x = u[j] < 0 ? -u[j] : u[j];
    top = x > top ? x : top;
  }
  constexpr float MOST = float(WIRE_LARGEST / 127.0 * (1 - 0x1p-24));
  const float scale = top / 127.0f;
  return scale < MOST ? scale : MOST;
}

// Nearest code, ties to even, within -127 .. 127; scale 0: only zeros and subnormals, code 0.
static void put_int8(uint8_t* values, int64_t count, float scale, const float* u, float* sent) {
  for (int64_t j = 0; j < count; ++j) {
    float code = scale > 0 ? u[j] / scale : 0.0f;
    code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
    const int8_t whole = int8_t((code + 0x1.8p23f) - 0x1.8p23f);  // to the nearest integer
    values[j] = uint8_t(whole);
    sent[j] = scale * float(whole);
  }
}

// Indices of entries [first, last) of a tile that starts at coordinate `begin`.
static void put_indices(const FeedbackArgs& x, const EmitArgs& out, int64_t begin, int64_t first,
                        int64_t last) {
  const uint16_t* local = out.entries.local;
  if (out.index == INDEX_TILE16)
    __builtin_memcpy(out.indices + 2 * first, local + first, size_t(2 * (last - first)));
  if (out.index != INDEX_BITMASK) return;
  const int64_t left = x.numel - begin;
  uint8_t* bits = out.indices + begin / 8;
  __builtin_memset(bits, 0, size_t(((left < SPARSE_TILE ? left : SPARSE_TILE) + 7) / 8));
  for (int64_t j = first; j < last; ++j)
    bits[local[j] >> 3] = uint8_t(bits[local[j] >> 3] | 1u << (local[j] & 7));
}

// e <- t - D, h <- h + D, v <- 0 where masked, at `count` coordinates begin + local[j].
static void correct_state(const FeedbackArgs& x, int64_t begin, int64_t count,
                          const uint16_t* local, const float* t, const float* sent) {
  constexpr int64_t AHEAD = 16;
  float* e = static_cast<float*>(x.e_new);
  PhiloxStream stream = x.rounding;
  stream.client = 0;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t i = begin + local[j];
    if (j + AHEAD < count) {
      const int64_t next = begin + local[j + AHEAD];
      if (x.h_new) __builtin_prefetch(x.h_new + next, 1);
      if (e && x.state_dtype == F32) __builtin_prefetch(e + next, 1);
    }
    if (e && x.state_dtype == F32) e[i] = t[j] - sent[j];
    if (e && x.state_dtype == BF16)
      static_cast<uint16_t*>(x.e_new)[i] = feedback_bf16(t[j] - sent[j], feedback_half(stream, i));
    if (x.h_new) x.h_new[i] = x.h_new[i] + sent[j];
    if (x.v_new && x.mask && sent[j] != 0) {
      if (x.state_dtype == F32)
        static_cast<float*>(x.v_new)[i] = 0;
      else
        static_cast<uint16_t*>(x.v_new)[i] = 0;
    }
  }
}

static void emit_tile(const FeedbackArgs& x, const EmitArgs& out, int64_t tile) {
  const SparseEntries& entries = out.entries;
  const int64_t begin = tile * SPARSE_TILE;
  const int64_t first = entries.starts[tile], last = entries.starts[tile + 1];
  put_indices(x, out, begin, first, last);
  constexpr int64_t BLOCK = 1024;
  float sent[BLOCK], scale = 0;
  if (out.value_dtype == WIRE_INT8) {
    scale = int8_scale(entries.u + first, last - first);
    store(out.scales + 4 * tile, scale);
  }
  for (int64_t j = first; j < last; j += BLOCK) {
    const int64_t count = last - j < BLOCK ? last - j : BLOCK;
    if (out.value_dtype == F32) put_values<F32>(out.values, j, count, entries.u + j, sent);
    if (out.value_dtype == F16) put_values<F16>(out.values, j, count, entries.u + j, sent);
    if (out.value_dtype == BF16) put_values<BF16>(out.values, j, count, entries.u + j, sent);
    if (out.value_dtype == WIRE_INT8)
      put_int8(out.values + j, count, scale, entries.u + j, sent);
    correct_state(x, begin, count, entries.local + j, entries.t ? entries.t + j : nullptr, sent);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
