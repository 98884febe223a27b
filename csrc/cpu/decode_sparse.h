// Sparse packets on their way back: entries of a tile into accumulators, or a range among zeros.
// Kernels see two kinds of indices, a bitmask or 16-bit ones: wire::parse has written the others out.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/layers.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "sections are read as stored");
static_assert(int(WIRE_INT8) == int(I8), "load1 reads the codes");

template <bool ADD, class T>
FLCORE_INLINE void put(char* at, T weight, T value) {
  store(at, ADD ? load<T>(at) + weight * value : value);
}

// Values of a tile. D: DType, or I8 for codes that multiply the scale of the tile.
template <int D>
struct EntryValues {
  const uint8_t* values;
  float scale;

  FLCORE_MEMBER EntryValues(const PacketView& p, int64_t tile)
      : values(p.values), scale(D == I8 ? load<float>(p.scales + 4 * tile) : 1) {}
  FLCORE_MEMBER float operator[](int64_t j) const {
    return D == I8 ? scale * load1<D>(values, j) : load1<D>(values, j);
  }
};

FLCORE_INLINE int64_t tile_bytes(int64_t numel, int64_t tile) {  // of its part of a bitmask
  const int64_t left = numel - tile * SPARSE_TILE;
  return ((left < SPARSE_TILE ? left : SPARSE_TILE) + 7) / 8;
}

FLCORE_INLINE uint64_t mask_word(const uint8_t* bits, int64_t bytes, int64_t at) {
  uint64_t word = 0;
  if (at + 8 <= bytes)
    word = load<uint64_t>(bits + at);
  else
    __builtin_memcpy(&word, bits + at, bytes - at);
  return word;
}

// visit(local index, position in the packet) for each entry of a tile, in index order
template <class Visit>
FLCORE_INLINE void for_entries(const PacketView& p, int64_t tile, const Visit& visit) {
  int64_t j = p.starts[tile];
  const int64_t stop = p.starts[tile + 1];
  if (!p.bitmask) {
    for (; j + 4 <= stop; j += 4) {  // one load of indices for four entries
      const uint64_t locals = load<uint64_t>(p.indices + 2 * j);
      unroll<4>([&](auto k) FLCORE_LAMBDA {
        visit(int64_t(locals >> (16 * k.value) & 0xffff), j + k.value);
      });
    }
    for (; j < stop; ++j) visit(int64_t(load<uint16_t>(p.indices + 2 * j)), j);
    return;
  }
  const int64_t bytes = tile_bytes(p.numel, tile);
  const uint8_t* bits = p.indices + tile * (SPARSE_TILE / 8);
  for (int64_t at = 0; at < bytes; at += 8)
    for (uint64_t word = mask_word(bits, bytes, at); word; word &= word - 1)
      visit(8 * at + __builtin_ctzll(word), j++);
}

// The same for local indices [from, to) alone.
template <class Visit>
FLCORE_INLINE void for_entries_between(const PacketView& p, int64_t tile, int64_t from, int64_t to,
                                       const Visit& visit) {
  int64_t j = p.starts[tile];
  const int64_t stop = p.starts[tile + 1];
  if (!p.bitmask) {
    const auto local = [&](int64_t i) { return int64_t(load<uint16_t>(p.indices + 2 * i)); };
    for (int64_t last = stop; j < last;) {  // the first entry that is not before `from`
      const int64_t middle = j + (last - j) / 2;
      if (local(middle) < from)
        j = middle + 1;
      else
        last = middle;
    }
    for (; j < stop && local(j) < to; ++j) visit(local(j), j);
    return;
  }
  const int64_t bytes = tile_bytes(p.numel, tile);
  const uint8_t* bits = p.indices + tile * (SPARSE_TILE / 8);
  int64_t at = 0;
  for (; at + 8 <= from / 8; at += 8) j += __builtin_popcountll(load<uint64_t>(bits + at));
  for (; at < bytes && 8 * at < to; at += 8)
    for (uint64_t word = mask_word(bits, bytes, at); word; word &= word - 1, ++j) {
      const int64_t local = 8 * at + __builtin_ctzll(word);
      if (local >= to) return;
      if (local >= from) visit(local, j);
    }
}

// ---- a tile into accumulators ------------------------------------------------------------------

// A tile inside one layer of type T (float or double).
template <int D, bool ADD, class T>
static void walk_layer(const DecodeArgs& x, const PacketView& p, int64_t tile, int64_t layer) {
  char* base = static_cast<char*>(x.out[layer]) +
               int64_t(sizeof(T)) * (tile * SPARSE_TILE - x.starts[layer]);
  const T weight = T(p.weight);
  const EntryValues<D> values(p, tile);
  for_entries(p, tile, [&](int64_t local, int64_t j) {
    put<ADD, T>(base + int64_t(sizeof(T)) * local, weight, T(values[j]));
  });
}

template <int D, bool ADD>
static void walk_tile(const DecodeArgs& x, const PacketView& p, int64_t tile) {
  const int64_t begin = tile * SPARSE_TILE;
  int64_t layer = find_layer(x.starts, x.layers, begin);
  const int64_t end = begin + SPARSE_TILE < x.numel ? begin + SPARSE_TILE : x.numel;
  if (end <= x.starts[layer + 1]) {
    if (x.dtype[layer] == F64)
      walk_layer<D, ADD, double>(x, p, tile, layer);
    else
      walk_layer<D, ADD, float>(x, p, tile, layer);
    return;
  }
  const EntryValues<D> values(p, tile);
  for_entries(p, tile, [&](int64_t local, int64_t j) {
    while (begin + local >= x.starts[layer + 1]) ++layer;  // indices increase
    char* out = static_cast<char*>(x.out[layer]);
    const int64_t at = begin + local - x.starts[layer];
    if (x.dtype[layer] == F64)
      put<ADD, double>(out + 8 * at, p.weight, double(values[j]));
    else
      put<ADD, float>(out + 4 * at, float(p.weight), values[j]);
  });
}

template <bool ADD>
static void walk_sparse(const DecodeArgs& x, const PacketView& p, int64_t tile) {
  if (p.value_dtype == F32) walk_tile<F32, ADD>(x, p, tile);
  if (p.value_dtype == F16) walk_tile<F16, ADD>(x, p, tile);
  if (p.value_dtype == BF16) walk_tile<BF16, ADD>(x, p, tile);
  if (p.value_dtype == WIRE_INT8) walk_tile<I8, ADD>(x, p, tile);
}

// ---- a range of one tile -----------------------------------------------------------------------

template <int D>
static void sparse_range(const PacketView& p, int64_t begin, int64_t count, float* out) {
  const int64_t tile = begin / SPARSE_TILE, from = begin - tile * SPARSE_TILE;
  const EntryValues<D> values(p, tile);
  for_entries_between(p, tile, from, from + count,
                      [&](int64_t local, int64_t j) { store(out + (local - from), values[j]); });
}

// D of coordinates [begin, begin + count) of one tile: values among zeros
static void sparse_range(const PacketView& p, int64_t begin, int64_t count, float* out) {
  __builtin_memset(out, 0, size_t(count) * 4);
  if (p.value_dtype == F32) sparse_range<F32>(p, begin, count, out);
  if (p.value_dtype == F16) sparse_range<F16>(p, begin, count, out);
  if (p.value_dtype == BF16) sparse_range<BF16>(p, begin, count, out);
  if (p.value_dtype == WIRE_INT8) sparse_range<I8>(p, begin, count, out);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
