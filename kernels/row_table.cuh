// What select and gram share: the table of row pointers that a launch carries by value, and the
// launch itself. A layer is cut into units of work, numbered through all layers of a table.
#pragma once

#include "check.h"
#include "common.cuh"

namespace flcore {
namespace cuda {

// Parameters may take 32,764 bytes since CUDA 12.1 (compute capability 7.0 and later).
constexpr int SMALL_WORDS = 1000, LARGE_WORDS = 4000;

// words: for each layer { first unit, length, dtype and alignment, out, row[rows] }
template <int WORDS>
struct RowTable {
  static constexpr int HEAD = 4;  // words of a layer before its row pointers
  int64_t units;
  int rows, layers;
  uint64_t words[WORDS];

  __host__ bool fits(int64_t more) const { return (layers + more) * (HEAD + rows) <= WORDS; }
  __device__ uint64_t at(int layer, int k) const { return words[layer * (HEAD + rows) + k]; }
  __device__ int64_t first_unit(int layer) const { return int64_t(at(layer, 0)); }
  __device__ int64_t numel(int layer) const { return int64_t(at(layer, 1)); }
  __device__ int dtype(int layer) const { return int(at(layer, 2) & 0xff); }
  __device__ bool aligned(int layer) const { return (at(layer, 2) >> 8) != 0; }
  __device__ void* out(int layer) const { return reinterpret_cast<void*>(at(layer, 3)); }
  __device__ const void* row(int layer, int i) const {
    return reinterpret_cast<const void*>(at(layer, HEAD + i));
  }
  __device__ int find(int64_t unit) const {  // the last layer that starts at or before the unit
    int low = 0, high = layers - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_unit(middle) <= unit)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

using SmallRows = RowTable<SMALL_WORDS>;
using LargeRows = RowTable<LARGE_WORDS>;
static_assert(sizeof(LargeRows) + 128 <= 32764, "parameter space");

// Rows of the most clients that a table takes.
constexpr int64_t ROW_TABLE_MAX_ROWS = LARGE_WORDS - LargeRows::HEAD;

// The layers a launch is about, as the argument structs of api.h hold them.
struct RowLayers {
  int64_t n, layers;
  const int* dtype;
  const void* const* rows;  // [n * layers]
  void* const* out;         // [layers] or null
};

// Calls launch(table) until every layer has been in one table. numel(l) is the length of layer l, 0
// to leave it out; units(l) how many units that makes; a layer counts as aligned when all its
// addresses are multiples of align(l) bytes.
template <class Table, class Numel, class Units, class Align, class Launch>
void for_row_tables(const RowLayers& a, const Numel& numel, const Units& units, const Align& align,
                    const Launch& launch) {
  Table t;
  t.units = 0;
  t.layers = 0;
  t.rows = int(a.n);
  const auto flush = [&] {
    if (t.layers > 0) launch(t);
    t.units = 0;
    t.layers = 0;
  };
  for (int64_t l = 0; l < a.layers; ++l) {
    if (numel(l) == 0) continue;
    if (!t.fits(1)) flush();
    uint64_t* e = t.words + t.layers++ * (Table::HEAD + t.rows);
    uint64_t address_bits = e[3] = a.out ? reinterpret_cast<uint64_t>(a.out[l]) : 0;
    for (int i = 0; i < t.rows; ++i) {
      e[Table::HEAD + i] = reinterpret_cast<uint64_t>(a.rows[i * a.layers + l]);
      address_bits |= e[Table::HEAD + i];
    }
    e[0] = uint64_t(t.units);
    e[1] = uint64_t(numel(l));
    e[2] = uint64_t(a.dtype[l]) | uint64_t(address_bits % align(l) == 0) << 8;
    t.units += units(l);
  }
  flush();
}

// ---- launch ------------------------------------------------------------------------------------

constexpr size_t SHARED_BY_DEFAULT = 48 << 10;  // bytes a block gets without being asked for more

// Queues `kernel`; throws naming it when the launch is refused.
template <class... Parameters, class... Arguments>
void start(const char* name, void (*kernel)(Parameters...), int64_t blocks, unsigned threads,
           size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  if (shared > SHARED_BY_DEFAULT)
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                         cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  check_launch(name);
}

// ---- dtypes as constants -----------------------------------------------------------------------

template <int I>
struct Constant {
  static constexpr int value = I;
};

// Calls f(Constant<D>) for a dtype that is read as Real: float64 as float64 only.
template <class Real, class F>
__device__ __forceinline__ void with_dtype(int dtype, const F& f) {
  if (dtype == F32)
    f(Constant<F32>());
  else if (dtype == F16)
    f(Constant<F16>());
  else if (dtype == BF16)
    f(Constant<BF16>());
  else if constexpr (sizeof(Real) == 8)
    f(Constant<F64>());
}

}  // namespace cuda
}  // namespace flcore
