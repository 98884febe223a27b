// The table a combine launch carries by value: weights, and for every layer of one dtype its length
// and addresses. Small tables make cheap launches, large ones few: a kernel exists for both sizes.
// Parameters may take 32,764 bytes since CUDA 12.1 (compute capability 7.0 and later).
#pragma once

#include "check.h"
#include "common.cuh"

namespace flcore {
namespace cuda {

constexpr int THREADS = 256;

// words: weight[rows], then for each layer { first tile, length, aligned, out, state, row[rows] }
template <int WORDS>
struct CombineTable {
  static constexpr int HEAD = 5;  // words of a layer before its row pointers
  int64_t tiles;                  // 16 bytes x THREADS of one layer each, the last one shorter
  double divisor;
  int rows, layers;
  uint64_t words[WORDS];

  __host__ __device__ static int64_t needed(int64_t rows, int64_t layers) {
    return rows + layers * (HEAD + rows);
  }
  __host__ __device__ uint64_t* entry(int layer) { return words + rows + layer * (HEAD + rows); }
  __device__ uint64_t at(int layer, int k) const { return words[rows + layer * (HEAD + rows) + k]; }

  __device__ int64_t first_tile(int layer) const { return int64_t(at(layer, 0)); }
  __device__ int64_t numel(int layer) const { return int64_t(at(layer, 1)); }
  __device__ bool aligned(int layer) const { return at(layer, 2) != 0; }
  __device__ void* out(int layer) const { return reinterpret_cast<void*>(at(layer, 3)); }
  __device__ void* state(int layer) const { return reinterpret_cast<void*>(at(layer, 4)); }
  __device__ const void* row(int layer, int i) const {
    return reinterpret_cast<const void*>(at(layer, HEAD + i));
  }
  template <class Real>
  __device__ Real weight(int i) const {  // put there in the type of the sum
    if constexpr (sizeof(Real) == 4)
      return __uint_as_float(uint32_t(words[i]));
    else
      return __longlong_as_double(int64_t(words[i]));
  }
  __device__ int find(int64_t tile) const {  // the last layer that starts at or before the tile
    int low = 0, high = layers - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_tile(middle) <= tile)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

using SmallTable = CombineTable<500>;   // 4,024 bytes
using LargeTable = CombineTable<4080>;  // 32,664 bytes
static_assert(sizeof(SmallTable) + 8 <= 4096 && sizeof(LargeTable) + 8 <= 32764, "parameter space");

template <class Real>
uint64_t word_of(double weight) {
  const Real w = Real(weight);
  uint64_t word = 0;
  memcpy(&word, &w, sizeof w);
  return word;
}

// a.weights may be null (nonfinite_kernel has no use for them)
template <class Table, int D, class Real>
Table make_table(const CombineArgs& a, int parts, const int* layers, int count) {
  Table t;
  t.tiles = 0;
  t.divisor = a.divisor;
  t.rows = int(a.n);
  t.layers = count;
  for (int i = 0; i < t.rows; ++i) t.words[i] = a.weights ? word_of<Real>(a.weights[i]) : 0;
  constexpr int64_t TILE = THREADS * 16 / sizeof(Stored<D>);
  for (int k = 0; k < count; ++k) {
    const int l = layers[k];
    uint64_t* e = t.entry(k);
    const uint64_t out = a.out ? reinterpret_cast<uint64_t>(a.out[l]) : 0;
    const uint64_t state = a.state ? reinterpret_cast<uint64_t>(a.state[l]) : 0;
    uint64_t address_bits = out | state;
    // bins lie one after the other: each must start on 16 bytes
    if (state && parts > 1) address_bits |= uint64_t(a.numel[l]) * sizeof(Real);
    for (int i = 0; i < t.rows; ++i) {
      e[Table::HEAD + i] = reinterpret_cast<uint64_t>(a.rows[i * a.layers + l]);
      address_bits |= e[Table::HEAD + i];
    }
    e[0] = uint64_t(t.tiles);
    e[1] = uint64_t(a.numel[l]);
    e[2] = address_bits % 16 == 0;
    e[3] = out;
    e[4] = state;
    t.tiles += (a.numel[l] + TILE - 1) / TILE;
  }
  return t;
}

// Calls launch(table) until every layer of dtype D has been in one table.
template <int D, class Real, class Launch>
void for_tables(const CombineArgs& a, int parts, const Launch& launch) {
  constexpr int CAPACITY = 512;  // layers gathered before a launch
  int layers[CAPACITY];
  int count = 0;
  const auto flush = [&] {
    if (count == 0) return;
    if (SmallTable::needed(a.n, count) <= 500)
      launch(make_table<SmallTable, D, Real>(a, parts, layers, count));
    else
      launch(make_table<LargeTable, D, Real>(a, parts, layers, count));
    count = 0;
  };
  for (int64_t l = 0; l < a.layers; ++l) {
    if (a.dtype[l] != D || a.numel[l] == 0) continue;
    if (count == CAPACITY || LargeTable::needed(a.n, count + 1) > 4080) flush();
    layers[count++] = int(l);
  }
  flush();
}

}  // namespace cuda
}  // namespace flcore
