// Lists of selected coordinates, and the k-th largest key of a list in cache.
// key(u) = bits(u) & 0x7fffffff orders by magnitude; integers only, so the same at every level.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

FLCORE_INLINE vi32 key_of(const vf32& x) { return (vi32)x & 0x7fffffff; }
FLCORE_INLINE uint32_t key_of(float x) { return bits_of(x) & 0x7fffffffu; }

constexpr uint32_t ALL_LANES = uint32_t((uint64_t(1) << LANES) - 1);

FLCORE_INLINE vi32 lane_numbers() {
  vi32 v;
  for (int k = 0; k < LANES; ++k) v[k] = k;
  return v;
}

// bit k: whether lane k of x > y, as signed numbers (keys are not negative)
FLCORE_INLINE uint32_t lanes_above(const vi32& x, const vi32& y) {
#if defined(__AVX512F__)
  return _mm512_cmpgt_epi32_mask((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)(x > y)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps((__m128)(x > y)));
#else
  uint32_t mask = 0;
  for (int k = 0; k < LANES; ++k) mask |= uint32_t(x[k] > y[k]) << k;
  return mask;
#endif
}

FLCORE_INLINE uint32_t lanes_equal(const vi32& x, const vi32& y) {
#if defined(__AVX512F__)
  return _mm512_cmpeq_epi32_mask((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)(x == y)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps((__m128)(x == y)));
#else
  uint32_t mask = 0;
  for (int k = 0; k < LANES; ++k) mask |= uint32_t(x[k] == y[k]) << k;
  return mask;
#endif
}

// The first `keep` set bits of a mask.
FLCORE_INLINE uint32_t lowest_bits(uint32_t mask, int64_t keep) {
  for (int64_t drop = __builtin_popcount(mask) - keep; drop > 0; --drop)
    mask &= ~(uint32_t(1) << (31 - __builtin_clz(mask)));
  return mask;
}

// Which keys are taken: those above `below`, and the first `quota` equal to it.
struct Choice {
  int32_t below;
  int64_t quota;

  FLCORE_MEMBER uint32_t lanes(const vi32& key) {
    const vi32 bound = vi32{} + below;
    uint32_t mask = lanes_above(key, bound);
    if (quota > 0) {
      const uint32_t equal = lowest_bits(lanes_equal(key, bound), quota);
      quota -= __builtin_popcount(equal);
      mask |= equal;
    }
    return mask;
  }
  FLCORE_MEMBER bool one(uint32_t key) {
    return int32_t(key) > below || (int32_t(key) == below && quota > 0 && quota--);
  }
};

constexpr int64_t ANY = int64_t(1) << 62;  // more than there are

// Keys from `cut` up, of those equal to it at most `quota`.
FLCORE_INLINE Choice choice_of(uint32_t cut, int64_t quota) {
  if (quota == ANY) return {int32_t(cut) - 1, 0};
  return {int32_t(cut), quota};
}

// Where chosen entries go, one after another, up to `limit`.
struct EntryList {
  uint16_t* local;
  float* u;
  float* t;  // null: not kept
  int64_t at, limit;
  bool full;  // there was no room for one

  FLCORE_MEMBER void put(int32_t index, float uv, float tv) {
    if (at == limit) {
      full = true;
      return;
    }
    local[at] = uint16_t(index);
    u[at] = uv;
    if (t) t[at] = tv;
    ++at;
  }

  // The lanes of a mask.
  FLCORE_MEMBER void push(uint32_t mask, const vi32& index, const vf32& uv, const vf32& tv) {
#if defined(__AVX512F__)
    if (at + LANES <= limit) {  // compressed in registers: compressing stores are slow on some cores
      const __mmask16 m = __mmask16(mask), all = __mmask16(0xffff);
      store(local + at, _mm512_maskz_cvtepi32_epi16(
                            all, _mm512_maskz_compress_epi32(m, (__m512i)index)));
      store(u + at, _mm512_maskz_compress_ps(m, (__m512)uv));
      if (t) store(t + at, _mm512_maskz_compress_ps(m, (__m512)tv));
      at += __builtin_popcount(mask);
      return;
    }
#endif
    for (; mask; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      put(index[lane], uv[lane], tv[lane]);
    }
  }
};

// Chooses among `count` coordinates whose local indices start at `first`; t may be null as in the list.
FLCORE_INLINE void choose(const float* u, const float* t, int64_t count, int32_t first,
                          Choice& choice, EntryList& list) {
  const vi32 numbers = lane_numbers();
  const float* left = t ? t : u;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const vf32 uv = load<vf32>(u + i);
    if (const uint32_t mask = choice.lanes(key_of(uv)))
      list.push(mask, numbers + (first + int32_t(i)), uv, load<vf32>(left + i));
  }
  for (; i < count; ++i) {
    const float uv = load<float>(u + i);
    if (choice.one(key_of(uv))) list.put(first + int32_t(i), uv, load<float>(left + i));
  }
}

// ---- the k-th largest ---------------------------------------------------------------------------

constexpr int KTH_BINS = 2048;
constexpr int64_t KTH_FEW = 256;  // bisecting so few costs less than clearing the bins

// Keys in [low, high] of numbers or of keys, to `to` (which may be where they come from, and has room
// for `count`); returns how many.
template <class T>
static int64_t keys_between(const T* from, int64_t count, uint32_t low, uint32_t high,
                            uint32_t* to) {
  int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
  const vi32 below = vi32{} + (int32_t(low) - 1), top = vi32{} + int32_t(high);
  for (; i + LANES <= count; i += LANES) {
    const vi32 key = load<vi32>(from + i) & 0x7fffffff;
    const uint32_t mask = lanes_above(key, below) & ~lanes_above(key, top) & ALL_LANES;
    store(to + kept, _mm512_maskz_compress_epi32(__mmask16(mask), (__m512i)key));
    kept += __builtin_popcount(mask);
  }
#endif
  for (; i < count; ++i) {
    const uint32_t key = load<uint32_t>(from + i) & 0x7fffffffu;
    to[kept] = key;
    kept += key >= low && key <= high;
  }
  return kept;
}

static int64_t keys_at_least(const uint32_t* keys, int64_t count, uint32_t bound) {
  const vi32 below = vi32{} + (int32_t(bound) - 1);
  int64_t found = 0, i = 0;
  for (; i + LANES <= count; i += LANES)
    found += __builtin_popcount(lanes_above(load<vi32>(keys + i), below));
  for (; i < count; ++i) found += keys[i] >= bound;
  return found;
}

// Bin that holds the need-th largest, counted from the top; `need` becomes its rank in the bin.
FLCORE_INLINE int descend(const uint32_t* counts, int64_t& need) {
  int bin = KTH_BINS - 1;
  for (; int64_t(counts[bin]) < need; --bin) need -= counts[bin];
  return bin;
}

// The k-th largest of `count` keys, 1 <= k <= count; their order is lost. One pass per 11 bits of
// the range they span, then bisection of the few that are left.
static uint32_t kth_largest(uint32_t* keys, int64_t count, int64_t k) {
  for (;;) {
    uint32_t low = keys[0], high = keys[0];
    for (int64_t i = 1; i < count; ++i) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
    if (low == high) return low;
    if (count <= KTH_FEW) {
      while (low < high) {
        const uint32_t middle = low + (high - low + 1) / 2;
        if (keys_at_least(keys, count, middle) >= k)
          low = middle;
        else
          high = middle - 1;
      }
      return low;
    }
    const int bits = 32 - __builtin_clz(high - low), shift = bits > 11 ? bits - 11 : 0;
    uint32_t counts[2][KTH_BINS];  // neighbours that agree hit different counters
    __builtin_memset(counts, 0, sizeof(counts));
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      ++counts[0][(keys[i] - low) >> shift];
      ++counts[1][(keys[i + 1] - low) >> shift];
    }
    if (i < count) ++counts[0][(keys[i] - low) >> shift];
    for (int b = 0; b < KTH_BINS; ++b) counts[0][b] += counts[1][b];
    const uint32_t first = low + (uint32_t(descend(counts[0], k)) << shift);
    if (shift == 0) return first;
    count = keys_between(keys, count, first, first + ((uint32_t(1) << shift) - 1), keys);
  }
}

}  // namespace FLCORE_ISA
}  // namespace flcore
