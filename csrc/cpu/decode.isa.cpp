// Adding packets into accumulators, and decoding one packet into a dense vector.
//   add    out[i] += w_p D_p[i]   for each packet p in list order, each coordinate i that p holds
//   dense  out[i] = D[i], 0 where the packet holds nothing
// Float32 accumulators: (float)w * D, rounded, then added, rounded; float64 ones the same in float64;
// no fma. Threads take tiles of 65,536 coordinates and walk all packets through a tile before the
// next (256 KiB of accumulator: it stays in L2), so a coordinate always sees the packets in list
// order: the same bits for any number of threads and any level. Reads every packet once and the
// touched lines of the accumulator once; a packet is never made dense.
// Packets were checked by wire::parse, so no index is checked here. Accumulators are a list of layers.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/layers.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "sections are read as stored");

template <bool ADD, class T>
FLCORE_INLINE void put(char* at, T weight, T value) {
  store(at, ADD ? load<T>(at) + weight * value : value);
}

// visit(local index, position in the packet) for each entry of a tile, in index order
template <class Visit>
FLCORE_INLINE void for_entries(const SparseView& p, int64_t numel, int64_t tile,
                               const Visit& visit) {
  int64_t j = p.starts[tile];
  const int64_t stop = p.starts[tile + 1];
  if (!p.bitmask) {
    for (; j < stop; ++j) visit(int64_t(load<uint16_t>(p.indices + 2 * j)), j);
    return;
  }
  const int64_t left = numel - tile * SPARSE_TILE;
  const int64_t bytes = ((left < SPARSE_TILE ? left : SPARSE_TILE) + 7) / 8;
  const uint8_t* bits = p.indices + tile * (SPARSE_TILE / 8);
  for (int64_t at = 0; at < bytes; at += 8) {
    uint64_t word = 0;
    __builtin_memcpy(&word, bits + at, bytes - at < 8 ? bytes - at : 8);
    for (; word; word &= word - 1) visit(8 * at + __builtin_ctzll(word), j++);
  }
}

// A tile inside one layer of type T (float or double).
template <int D, bool ADD, class T>
static void walk_layer(const DecodeArgs& x, const SparseView& p, int64_t tile, int64_t layer) {
  char* base = static_cast<char*>(x.out[layer]) +
               int64_t(sizeof(T)) * (tile * SPARSE_TILE - x.starts[layer]);
  const T weight = T(p.weight);
  for_entries(p, x.numel, tile, [&](int64_t local, int64_t j) {
    put<ADD, T>(base + int64_t(sizeof(T)) * local, weight, T(load1<D>(p.values, j)));
  });
}

template <int D, bool ADD>
static void walk_tile(const DecodeArgs& x, const SparseView& p, int64_t tile) {
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
  for_entries(p, x.numel, tile, [&](int64_t local, int64_t j) {
    while (begin + local >= x.starts[layer + 1]) ++layer;  // indices increase
    char* out = static_cast<char*>(x.out[layer]);
    const int64_t at = begin + local - x.starts[layer];
    const float value = load1<D>(p.values, j);
    if (x.dtype[layer] == F64)
      put<ADD, double>(out + 8 * at, p.weight, double(value));
    else
      put<ADD, float>(out + 4 * at, float(p.weight), value);
  });
}

template <bool ADD>
static void walk(const DecodeArgs& x, const SparseView& p, int64_t tile) {
  if (p.value_dtype == F32) walk_tile<F32, ADD>(x, p, tile);
  if (p.value_dtype == F16) walk_tile<F16, ADD>(x, p, tile);
  if (p.value_dtype == BF16) walk_tile<BF16, ADD>(x, p, tile);
}

static void zero_tile(const DecodeArgs& x, int64_t tile) {
  const int64_t begin = tile * SPARSE_TILE;
  const int64_t end = begin + SPARSE_TILE < x.numel ? begin + SPARSE_TILE : x.numel;
  int64_t at = begin;
  for (int64_t layer = find_layer(x.starts, x.layers, begin); at < end; ++layer) {
    const int64_t stop = x.starts[layer + 1] < end ? x.starts[layer + 1] : end;
    if (stop == at) continue;  // an empty layer, perhaps without an address
    const int64_t bytes = dtype_bytes(x.dtype[layer]);
    char* from = static_cast<char*>(x.out[layer]) + bytes * (at - x.starts[layer]);
    __builtin_memset(from, 0, (stop - at) * bytes);
    at = stop;
  }
}

// ---- table ------------------------------------------------------------------------------------

int64_t tile_count(const DecodeArgs& x) { return (x.numel + SPARSE_TILE - 1) / SPARSE_TILE; }

void add(const DecodeArgs& x) {
  for_chunks(tile_count(x), x.threads, [&](int64_t tile) {
    for (int64_t p = 0; p < x.packets; ++p) walk<true>(x, x.views[p], tile);
  });
}

void dense(const DecodeArgs& x) {
  for_chunks(tile_count(x), x.threads, [&](int64_t tile) {
    zero_tile(x, tile);
    walk<false>(x, x.views[0], tile);
  });
}

}  // namespace
}  // namespace FLCORE_ISA

extern const DecodeFns FLCORE_TABLE(decode);
const DecodeFns FLCORE_TABLE(decode) = {&FLCORE_ISA::add, &FLCORE_ISA::dense};

}  // namespace flcore
