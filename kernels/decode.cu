// Adding packets into accumulators on the GPU, and decoding one (DecodeArgs in api.h):
//   out[i] += w_p D_p[i]   packets in list order; or out[i] = D_0[i], 0 where it holds nothing
// A block takes 8192 neighbouring coordinates of a layer into shared memory and walks the list: reads
// every packet once and reads and writes the accumulator once, 8 bytes a coordinate in float32; no
// packet is made dense in memory.
//   sparse   a thread an entry, each coordinate at most once a packet: no two threads meet. The
//            entries of the block are found by bisection, a thread a packet, before the walk
//   bitmask  a thread 32 coordinates; ranks are sums of bit counts over the block
//   buckets  a thread a coordinate
// Exactness: a coordinate sees the packets in list order, between barriers where its thread changes;
// product and sum are rounded one by one: the bits of csrc/cpu/decode.isa.cpp for any grid.
#include "check.h"
#include "codes.cuh"
#include "launch.h"
#include "row_table.cuh"
#include "scan.cuh"

namespace flcore {
namespace cuda {

constexpr int THREADS = 256;
constexpr int BLOCKS_PER_SM = 4;   // as registers allow; a block has 36 KiB of shared memory, or 68
constexpr int64_t CHUNK = 8192;    // coordinates of a block: 32 a thread, a word of a bitmask
static_assert(SPARSE_TILE % CHUNK == 0 && CHUNK == 32 * THREADS, "a thread a word");

extern __shared__ uint4 shared_words[];

// ---- layers ------------------------------------------------------------------------------------

// Layers of one dtype, cut at the multiples of CHUNK in the coordinates of the whole update.
struct DecodeTable {
  static constexpr int LAYERS = 240, WORDS = 4;  // { first unit, first coordinate, last + 1, out }
  int64_t units;
  int layers;
  uint64_t words[LAYERS * WORDS];

  __device__ int64_t at(int layer, int k) const { return int64_t(words[layer * WORDS + k]); }
  __device__ int find(int64_t unit) const {  // the last layer that starts at or before the unit
    int low = 0, high = layers - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (at(middle, 0) <= unit)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

// ---- one packet into the accumulators of a block -----------------------------------------------

__device__ __forceinline__ float plus_product(float acc, float w, float d) {
  return __fadd_rn(acc, __fmul_rn(w, d));
}
__device__ __forceinline__ double plus_product(double acc, double w, double d) {
  return __dadd_rn(acc, __dmul_rn(w, d));
}

template <bool ADD, class T>
__device__ __forceinline__ void put(T& acc, T weight, float d) {
  acc = ADD ? plus_product(acc, weight, T(d)) : T(d);
}

// Where the coordinates of a block lie in a packet.
struct Place {
  int64_t first;  // its first entry among them, or the bucket that holds the first of them
  int rest;       // entries among them, or coordinates of that bucket before them
};

// The first of entries [from, to) of a tile whose local index is not below `local`.
__device__ __forceinline__ int64_t lower_bound(const uint16_t* index, int64_t from, int64_t to,
                                               int local) {
  while (from < to) {
    const int64_t middle = (from + to) / 2;
    if (int(__ldg(index + middle)) < local)
      from = middle + 1;
    else
      to = middle;
  }
  return from;
}

__device__ __forceinline__ Place find_place(const PacketView& p, int64_t begin, int count) {
  if (p.codec != CODEC_SPARSE) {
    const int64_t bucket = begin / p.bucket;
    return {bucket, int(begin - bucket * p.bucket)};
  }
  if (p.bitmask) return {0, 0};
  const int64_t tile = begin / SPARSE_TILE, last = __ldg(p.starts + tile + 1);
  const int local = int(begin % SPARSE_TILE);
  const uint16_t* index = reinterpret_cast<const uint16_t*>(p.indices);
  const int64_t first = lower_bound(index, __ldg(p.starts + tile), last, local);
  return {first, int(lower_bound(index, first, last, local + count) - first)};
}

template <class F>
__device__ __forceinline__ void with_entry_values(const PacketView& p, int64_t tile, const F& f) {
  if (p.value_dtype == F32) f([&](int64_t j) { return stored_value<F32>(p.values, j); });
  if (p.value_dtype == F16) f([&](int64_t j) { return stored_value<F16>(p.values, j); });
  if (p.value_dtype == BF16) f([&](int64_t j) { return stored_value<BF16>(p.values, j); });
  if (p.value_dtype == WIRE_INT8) {
    const float scale = stored_value<F32>(p.scales, tile);
    f([&](int64_t j) { return __fmul_rn(scale, float(int8_t(__ldg(p.values + j)))); });
  }
}

template <bool ADD, class T>
__device__ __forceinline__ void add_entries(const PacketView& p, const Place& place,
                                            int64_t begin, T* acc) {
  const T weight = T(p.weight);
  const int local = int(begin % SPARSE_TILE);
  const uint16_t* index = reinterpret_cast<const uint16_t*>(p.indices);
  with_entry_values(p, begin / SPARSE_TILE, [&](const auto& value) {
    for (int e = int(threadIdx.x); e < place.rest; e += THREADS) {
      const int64_t j = place.first + e;
      put<ADD>(acc[int(__ldg(index + j)) - local], weight, value(j));
    }
  });
}

// Thread t has the bits of coordinates 32 t .. 32 t + 31 after the multiple of CHUNK at or before
// `begin`; those outside [begin, begin + count) only count.
template <bool ADD, class T>
__device__ __forceinline__ void add_bitmask(const PacketView& p, int64_t begin, int count, T* acc,
                                            uint32_t* scratch) {
  const int64_t tile = begin / SPARSE_TILE, chunk = begin / CHUNK * CHUNK;
  const uint32_t* mask = reinterpret_cast<const uint32_t*>(p.indices) + tile * (SPARSE_TILE / 32);
  const int words = int(chunk % SPARSE_TILE) / 32, mine = words + int(threadIdx.x);
  const bool inside = chunk + 32 * int64_t(threadIdx.x) < p.numel;
  uint32_t word = inside ? __ldg(mask + mine) : 0, before = 0;
  for (int w = int(threadIdx.x); w < words; w += THREADS) before += __popc(__ldg(mask + w));
  uint32_t total;  // low half: bits of this chunk, at most 8192; high half: of those before it
  const uint32_t rank =
      scan_block<THREADS>(before << 16 | uint32_t(__popc(word)), scratch, total) & 0xffffu;
  int64_t j = __ldg(p.starts + tile) + (total >> 16) + rank;
  const T weight = T(p.weight);
  const int skip = int(begin - chunk);
  with_entry_values(p, tile, [&](const auto& value) {
    for (; word; word &= word - 1, ++j) {
      const int i = 32 * int(threadIdx.x) + __ffs(int(word)) - 1 - skip;
      if (i >= 0 && i < count) put<ADD>(acc[i], weight, value(j));
    }
  });
}

template <bool ADD, class T>
__device__ __forceinline__ void add_buckets(const PacketView& p, const Place& place, int count,
                                            T* acc) {
  const T weight = T(p.weight);
  const uint32_t size = uint32_t(p.bucket);
  with_values(p, [&](const auto& value) {
#pragma unroll 4
    for (int i = int(threadIdx.x); i < count; i += THREADS) {
      const uint32_t at = uint32_t(place.rest + i), b = at / size;
      put<ADD>(acc[i], weight, value(place.first + b, at - b * size));
    }
  });
}

// ---- kernel ------------------------------------------------------------------------------------

// Shared memory: T [CHUNK], Place [THREADS], a word a warp.
template <class T, bool ADD>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 3 : 4)
    decode_kernel(const __grid_constant__ DecodeTable t, const PacketView* views, int64_t packets) {
  T* acc = reinterpret_cast<T*>(shared_words);
  Place* places = reinterpret_cast<Place*>(acc + CHUNK);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(places + THREADS);
  for (int64_t unit = blockIdx.x; unit < t.units; unit += gridDim.x) {
    const int layer = t.find(unit);
    const int64_t start = t.at(layer, 1), end = t.at(layer, 2);
    const int64_t chunk = (start / CHUNK + unit - t.at(layer, 0)) * CHUNK;
    const int64_t begin = start > chunk ? start : chunk;
    const int count = int((end < chunk + CHUNK ? end : chunk + CHUNK) - begin);
    T* out = reinterpret_cast<T*>(t.at(layer, 3)) + (begin - start);
    __syncthreads();  // the unit before this one is written
    for (int i = int(threadIdx.x); i < count; i += THREADS) acc[i] = ADD ? out[i] : T(0);
    for (int64_t first = 0; first < packets; first += THREADS) {
      const int64_t mine = first + threadIdx.x;
      __syncthreads();
      if (mine < packets) places[threadIdx.x] = find_place(views[mine], begin, count);
      __syncthreads();
      bool scattered = false;  // by the packet before this one
      for (int64_t i = first; i < packets && i < first + THREADS; ++i) {
        const PacketView& p = views[i];
        const bool sparse = p.codec == CODEC_SPARSE;
        if (sparse || scattered) __syncthreads();
        if (!sparse)
          add_buckets<ADD>(p, places[i - first], count, acc);
        else if (p.bitmask)
          add_bitmask<ADD>(p, begin, count, acc, scratch);
        else
          add_entries<ADD>(p, places[i - first], begin, acc);
        scattered = sparse;
      }
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < count; i += THREADS) out[i] = acc[i];
  }
}

// ---- launchers ---------------------------------------------------------------------------------

template <class T, bool ADD>
static void launch_layers(const DecodeArgs& a, int64_t blocks, cudaStream_t stream) {
  DecodeTable t;
  t.units = 0;
  t.layers = 0;
  const auto flush = [&] {
    if (t.units == 0) return;
    const size_t shared = CHUNK * sizeof(T) + THREADS * sizeof(Place) + THREADS / 32 * 4;
    start("decode_kernel", &decode_kernel<T, ADD>, t.units < blocks ? t.units : blocks, THREADS,
          shared, stream, t, a.views, a.packets);
    t.units = 0;
    t.layers = 0;
  };
  for (int64_t l = 0; l < a.layers; ++l) {
    if ((a.dtype[l] == F64) != (sizeof(T) == 8) || a.starts[l] == a.starts[l + 1]) continue;
    if (t.layers == DecodeTable::LAYERS) flush();
    uint64_t* e = t.words + DecodeTable::WORDS * t.layers++;
    e[0] = uint64_t(t.units);
    e[1] = uint64_t(a.starts[l]);
    e[2] = uint64_t(a.starts[l + 1]);
    e[3] = reinterpret_cast<uint64_t>(a.out[l]);
    t.units += (a.starts[l + 1] - 1) / CHUNK - a.starts[l] / CHUNK + 1;
  }
  flush();
}

void launch_decode(const DecodeArgs& a, bool add, int device, uintptr_t stream) {
  FLCORE_CHECK(add || a.packets == 1, "packets: expected one, got ", a.packets);
  const DeviceGuard guard(device);
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  const int64_t blocks = int64_t(multiprocessors(device)) * BLOCKS_PER_SM;
  if (add) {
    launch_layers<float, true>(a, blocks, s);
    launch_layers<double, true>(a, blocks, s);
  } else {
    launch_layers<float, false>(a, blocks, s);
    launch_layers<double, false>(a, blocks, s);
  }
}

}  // namespace cuda
}  // namespace flcore
