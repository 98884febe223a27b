// Adding packets into accumulators, and decoding one packet into a dense vector.
//   add    out[i] += w_p D_p[i]   for each packet p in list order, each coordinate i that p holds
//   dense  out[i] = D[i], 0 where the packet holds nothing
//   rows   coordinates [begin, begin + count) of several packets, each into a row of scratch
// Float32 accumulators: (float)w * D, rounded, then added, rounded; float64 ones the same in float64;
// no fma. Threads take tiles of 65,536 coordinates (32,768 when no packet is sparse). Sparse packets
// are walked through a whole tile (256 KiB of accumulator: it stays in L2; smaller parts would save
// time in L1 and lose more to loops of unforeseen length), neighbours in the list that are not
// sparse block by block of 4096 (16 KiB: L1), up to eight at a visit; either way a coordinate sees
// the packets in list order: the same bits for any number of threads and any level. Reads every
// packet once and the touched lines of the accumulator once (all lines where most are touched); a
// packet is never made dense in memory.
// Packets were checked by wire::parse, so nothing is checked here. Accumulators are a list of layers.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/codes.h"
#include "cpu/codes_float.h"
#include "cpu/codes_rotated.h"
#include "cpu/codes_thc.h"
#include "cpu/decode_group.h"
#include "cpu/decode_linear.h"
#include "cpu/decode_low_rank.h"
#include "cpu/decode_sketch.h"
#include "cpu/decode_sparse.h"
#include "cpu/layers.h"
#include "cpu/packets.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

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

// ---- buckets -----------------------------------------------------------------------------------

constexpr int64_t BLOCK = BLOCK_MAX;
constexpr int64_t PIECE = BLOCK + 64;  // floats of a piece with what comes before it

// Part of a bucket, or a run of whole ones for the codecs that take it.
static void dequantize(const PacketView& p, const Segment& s, float* out, float* work) {
  switch (p.codec) {
    case CODEC_DENSE: return dequantize_dense(p, s, out, work);
    case CODEC_NATURAL: return dequantize_natural(p, s, out, work);
    case CODEC_MINIFLOAT: return dequantize_minifloat(p, s, out, work);
    case CODEC_ROTATED: return dequantize_rotated(p, s, out, work);
    case CODEC_THC: return dequantize_thc(p, s, out, work);
    default: walk_linear<false>(p, s, 1, out, reinterpret_cast<uint8_t*>(work));
  }
}

static bool is_whole(int codec) { return codec == CODEC_ROTATED || codec == CODEC_THC; }
static bool takes_runs(int codec) {
  return codec == CODEC_DENSE || codec == CODEC_NATURAL || codec == CODEC_MINIFLOAT;
}

// visit(segment, offset) for each part of a bucket within [begin, begin + count)
template <class Visit>
FLCORE_INLINE void for_segments(const PacketView& p, int64_t begin, int64_t count,
                                const Visit& visit) {
  for (int64_t done = 0; done < count;) {
    const int64_t at = begin + done, bucket = at / p.bucket, start = bucket * p.bucket;
    const int64_t length = p.numel - start < p.bucket ? p.numel - start : p.bucket;
    const int64_t left = length - (at - start), wanted = count - done;
    int64_t n = left < wanted ? left : wanted;
    if (at == start && left < wanted && takes_runs(p.codec)) n = wanted - wanted % p.bucket;
    if (n == 0) n = left;
    visit(Segment{bucket, length, at - start, n}, done);
    done += n;
  }
}

// work: [DECODE_WORK]; count <= BLOCK
static void bucket_range(const PacketView& p, int64_t begin, int64_t count, float* out,
                         float* work) {
  float* const piece = work + 2 * BLOCK;
  for_segments(p, begin, count, [&](const Segment& s, int64_t at) {
    const int64_t skip = is_whole(p.codec) ? s.begin : is_linear(p.codec) ? 0 : s.begin % 8;
    if (skip == 0 && (s.n == s.length || !is_whole(p.codec))) {
      dequantize(p, s, out + at, work);
      return;
    }
    const int64_t n = is_whole(p.codec) ? s.length : s.n + skip;
    dequantize(p, Segment{s.bucket, s.length, s.begin - skip, n}, piece, work);
    __builtin_memcpy(out + at, piece + skip, size_t(s.n) * 4);
  });
}

// D of coordinates [begin, begin + count), which lie in one tile; count <= BLOCK
static void decode_range(const PacketView& p, int64_t begin, int64_t count, float* out,
                         float* work) {
  if (p.codec == CODEC_SPARSE)
    sparse_range(p, begin, count, out);
  else if (p.codec == CODEC_LOW_RANK)
    dequantize_low_rank(p, begin, count, out);
  else if (p.codec == CODEC_SKETCH)
    dequantize_sketch(p, begin, count, out);
  else
    bucket_range(p, begin, count, out, work);
}

// ---- blocks of accumulators --------------------------------------------------------------------

template <bool ADD, class T>
static void put_values(char* out, int64_t n, const float* d, T weight) {
  for (int64_t i = 0; i < n; ++i) put<ADD, T>(out + int64_t(sizeof(T)) * i, weight, T(d[i]));
}

// D of [begin, begin + count) into the layers it lies in
template <bool ADD>
static void put_layers(const DecodeArgs& x, int64_t begin, int64_t count, const float* d,
                       double weight) {
  int64_t layer = find_layer(x.starts, x.layers, begin);
  for (int64_t done = 0; done < count; ++layer) {
    const int64_t at = begin + done - x.starts[layer], left = x.starts[layer + 1] - begin - done;
    const int64_t n = left < count - done ? left : count - done;
    if (n <= 0) continue;  // an empty layer, perhaps without an address
    char* out = static_cast<char*>(x.out[layer]);
    if (x.dtype[layer] == F64)
      put_values<ADD, double>(out + 8 * at, n, d + done, weight);
    else
      put_values<ADD, float>(out + 4 * at, n, d + done, float(weight));
    done += n;
  }
}

// The address of [begin, begin + count) in its layer if that is one of float32, else null
static float* inside_layer(const DecodeArgs& x, int64_t begin, int64_t count) {
  const int64_t layer = find_layer(x.starts, x.layers, begin);
  if (x.dtype[layer] != F32 || begin + count > x.starts[layer + 1]) return nullptr;
  return reinterpret_cast<float*>(static_cast<char*>(x.out[layer]) + 4 * (begin - x.starts[layer]));
}

// The same for layers of float32 that a block lies across: the accumulators to or from one piece,
// so that many packets find them together. Returns whether all layers are float32.
template <bool BACK>
static bool move_accumulators(const DecodeArgs& x, int64_t begin, int64_t count, float* piece) {
  bool all = true;
  for_pieces(x.starts, x.layers, begin, begin + count,
             [&](int64_t layer, int64_t offset, int64_t at, int64_t n) {
               if (x.dtype[layer] != F32) {
                 all = false;
                 return;
               }
               char* out = static_cast<char*>(x.out[layer]) + 4 * offset;
               if (BACK)
                 __builtin_memcpy(out, piece + at, size_t(n) * 4);
               else
                 __builtin_memcpy(piece + at, out, size_t(n) * 4);
             });
  return all;
}

constexpr int GROUP = 8;  // packets at a visit: their numbers fit the registers
static_assert(GROUP * CODE_BYTES <= DECODE_WORK * 4, "codes of a group are unpacked into `work`");

// N packets of a group, or one that is linear
template <int N>
static void add_linear(const PacketView* p, int64_t begin, int64_t count, float* out, float* work) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(work);
  for_segments(*p, begin, count, [&](const Segment& s, int64_t at) {
    if constexpr (N == 1)
      walk_linear<true>(*p, s, float(p->weight), out + at, bytes);
    else
      add_group<N>(p, s, out + at, bytes);
  });
}

// The first of `left` packets and perhaps some that follow, into float32 accumulators that lie
// together; count <= BLOCK. Returns how many.
static int64_t add_some(const PacketView* p, int64_t left, int64_t begin, int64_t count, float* out,
                        float* d, float* work) {
  if (left >= GROUP && is_group(p, GROUP)) {
    add_linear<GROUP>(p, begin, count, out, work);
    return GROUP;
  }
  if (left >= GROUP / 2 && is_group(p, GROUP / 2)) {
    add_linear<GROUP / 2>(p, begin, count, out, work);
    return GROUP / 2;
  }
  if (is_linear(p->codec)) {
    add_linear<1>(p, begin, count, out, work);
  } else {
    decode_range(*p, begin, count, d, work);
    put_values<true, float>(reinterpret_cast<char*>(out), count, d, float(p->weight));
  }
  return 1;
}

struct alignas(64) Block {
  float d[PIECE], sums[BLOCK], work[DECODE_WORK];
};

// Neighbours [first, last) in the list, none sparse, over coordinates [begin, end)
static void add_run(const DecodeArgs& x, int64_t first, int64_t last, int64_t begin, int64_t end,
                    Block& block) {
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t count = end - at < BLOCK ? end - at : BLOCK;
    float* const direct = inside_layer(x, at, count);
    if (direct || move_accumulators<false>(x, at, count, block.sums)) {
      float* const out = direct ? direct : block.sums;
      for (int64_t p = first; p < last;)
        p += add_some(x.views + p, last - p, at, count, out, block.d, block.work);
      if (!direct) move_accumulators<true>(x, at, count, block.sums);
      continue;
    }
    for (int64_t p = first; p < last; ++p) {
      decode_range(x.views[p], at, count, block.d, block.work);
      put_layers<true>(x, at, count, block.d, x.views[p].weight);
    }
  }
}

// ---- table ------------------------------------------------------------------------------------

// Neighbours [first, last) in the list, all sparse, over the tile [begin, end). Where they touch most
// lines of it these are read once in order before: entries are spread too wide for the processor to
// foresee the next line, and waiting for memory would take twice as long as all the rest.
static void add_sparse_run(const DecodeArgs& x, int64_t first, int64_t last, int64_t begin,
                           int64_t end) {
  constexpr int64_t LINE = 64;
  const int64_t tile = begin / SPARSE_TILE;
  int64_t entries = 0;
  for (int64_t p = first; p < last; ++p)
    entries += x.views[p].starts[tile + 1] - x.views[p].starts[tile];
  if (entries >= SPARSE_TILE * 4 / LINE)  // one a line of float32: 63 % of them
    for_pieces(x.starts, x.layers, begin, end,
               [&](int64_t layer, int64_t offset, int64_t, int64_t n) {
                 const int64_t size = dtype_bytes(x.dtype[layer]);
                 const volatile char* from = static_cast<const char*>(x.out[layer]) + size * offset;
                 for (int64_t i = 0; i < size * n; i += LINE) (void)from[i];
               });
  for (int64_t p = first; p < last; ++p) walk_sparse<true>(x, x.views[p], tile);
}

void add_part(const DecodeArgs& x, int64_t begin, int64_t end) {
  Block block;
  for (int64_t p = 0; p < x.packets;) {
    const int64_t first = p;
    const bool sparse = x.views[p].codec == CODEC_SPARSE;
    while (p < x.packets && (x.views[p].codec == CODEC_SPARSE) == sparse) ++p;
    if (sparse)
      add_sparse_run(x, first, p, begin, end);
    else
      add_run(x, first, p, begin, end, block);
  }
}

void add(const DecodeArgs& x) {
  bool sparse = false;
  for (int64_t p = 0; p < x.packets; ++p) sparse |= x.views[p].codec == CODEC_SPARSE;
  const int64_t size = sparse ? SPARSE_TILE : SPARSE_TILE / 2;
  for_chunks((x.numel + size - 1) / size, x.threads, [&](int64_t chunk) {
    const int64_t begin = chunk * size, end = begin + size < x.numel ? begin + size : x.numel;
    add_part(x, begin, end);
  });
}

void dense(const DecodeArgs& x) {
  const PacketView& p = x.views[0];
  for_chunks((x.numel + SPARSE_TILE - 1) / SPARSE_TILE, x.threads, [&](int64_t tile) {
    if (p.codec == CODEC_SPARSE) {
      zero_tile(x, tile);
      walk_sparse<false>(x, p, tile);
      return;
    }
    Block block;
    const int64_t stop = (tile + 1) * SPARSE_TILE, end = stop < x.numel ? stop : x.numel;
    for (int64_t at = tile * SPARSE_TILE; at < end; at += BLOCK) {
      const int64_t count = end - at < BLOCK ? end - at : BLOCK;
      if (float* direct = inside_layer(x, at, count)) {
        decode_range(p, at, count, direct, block.work);
      } else {
        decode_range(p, at, count, block.d, block.work);
        put_layers<false>(x, at, count, block.d, 1);
      }
    }
  });
}

void rows(const PacketView* views, int64_t n, int64_t begin, int64_t count, float* out,
          int64_t stride, float* work) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t done = 0; done < count;) {
      const int64_t at = begin + done, end = (at / BLOCK + 1) * BLOCK;  // no tile is crossed
      const int64_t part = count - done < end - at ? count - done : end - at;
      decode_range(views[i], at, part, out + i * stride + done, work);
      done += part;
    }
}

}  // namespace
}  // namespace FLCORE_ISA

extern const DecodeFns FLCORE_TABLE(decode);
const DecodeFns FLCORE_TABLE(decode) = {&FLCORE_ISA::add, &FLCORE_ISA::dense, &FLCORE_ISA::rows,
                                        &FLCORE_ISA::add_part};

}  // namespace flcore
