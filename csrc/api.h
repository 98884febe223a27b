// The one contract between callers and kernels: plain structs, plain pointers, 64-bit sizes.
// Knows neither Python nor torch nor CUDA headers. CPU kernels and CUDA launchers take the same
// argument structs, so that a variant can replace another without a change in the caller.
#pragma once

#include <cstdint>

#include "philox.h"

namespace flcore {

// Storage types. python/flcore/_arrays.py holds the same codes; tests/test_build.py compares them.
enum DType : int { F64 = 0, F32 = 1, F16 = 2, BF16 = 3, DTYPE_COUNT = 4 };

constexpr int64_t dtype_bytes(int dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

// ---- combine: weighted sum of client rows (csrc/cpu/combine.isa.cpp, kernels/combine.cu) ------

enum Accumulate : int { ACC_F32 = 0, ACC_F64 = 1, ACC_REPRODUCIBLE = 2, ACCUMULATE_COUNT = 3 };

// Grid of the order-independent accumulator: three float64 bins, multiples of these units.
constexpr double BIN_UNIT[3] = {128.0, 0x1p-33, 0x1p-73};
constexpr double BIN_LIMIT = 0x1p46;        // |w x| at and above this is out of range
constexpr int64_t BIN_MAX_TERMS = 1 << 14;  // terms one accumulator can take exactly

enum CombineFlags : int { COMBINE_NONFINITE = 1, COMBINE_OUT_OF_RANGE = 2 };

// acc[l][j] = (state ? state[l][j] : 0) + sum_i weights[i] * rows[i * layers + l][j]
//   out given:  out[l][j] = cast(acc[l][j] / divisor) in the layer's dtype; state is only read
//   no out:     state[l][j] = acc[l][j]
// A float64 layer always accumulates in float64 (or reproducibly), the others as `accumulate` says.
// state[l]: float32 or float64 [numel], or float64 [3, numel] bins when reproducible.
struct CombineArgs {
  int64_t n;                  // client rows; weights are not zero (the caller drops such rows)
  int64_t layers;
  const int64_t* numel;       // [layers]
  const int* dtype;           // [layers], DType of the layer in every row and in out
  const void* const* rows;    // [n * layers], any alignment
  const double* weights;      // [n]
  void* const* state;         // [layers] or null
  void* const* out;           // [layers] or null
  int accumulate;             // Accumulate
  double divisor;
  int threads;
  bool check;                 // look for non-finite sums; a CUDA launcher is told by its flag pointer
  int64_t* first_tile;        // [layers + 1] scratch of the CPU kernel
};

// flags[i] = 1 when row i holds a NaN or an infinity, else 0
struct FiniteArgs {
  int64_t n, layers;
  const int64_t* numel;       // [layers]
  const int* dtype;           // [layers]
  const void* const* rows;    // [n * layers]
  int32_t* flags;             // [n]
  int threads;
  int64_t* first_tile;        // [layers + 1] scratch of the CPU kernel
};

struct CombineFns {
  int (*combine)(const CombineArgs&);      // returns CombineFlags
  void (*nonfinite)(const FiniteArgs&);
};

// ---- rng: stretches of Philox streams (csrc/cpu/rng.isa.cpp, kernels/rng.cu) -------------------

// out[j] = element offset + j of the stream, 0 <= j < numel; offset + numel <= 2^34
struct RngArgs {
  PhiloxStream stream;
  int64_t offset, numel;
  void* out;                  // uint32 or float32 [numel]
  int threads;
};

struct RngFns {
  void (*bits)(const RngArgs&);     // uint32
  void (*uniform)(const RngArgs&);  // float32 in [0, 1)
};

// ---- probe: what this machine's memory can do (csrc/cpu/probe.isa.cpp) -------------------------

struct ProbeFns {
  uint64_t (*read)(const void* src, int64_t bytes, int threads);
  void (*copy)(void* dst, const void* src, int64_t bytes, int threads);
};

// ---- sparsify: feedback, exact top-k, state update (csrc/cpu/sparsify.isa.cpp) -----------------

constexpr int64_t SPARSE_TILE = 65536;  // coordinates a tile of the packet: 16-bit local indices

// Digits of the 31-bit key of |u|, from the top.
constexpr int SPARSIFY_LEVELS = 3, SPARSIFY_BINS = 2048;
constexpr int SPARSIFY_SHIFT[SPARSIFY_LEVELS] = {20, 9, 0};
constexpr int SPARSIFY_WIDTH[SPARSIFY_LEVELS] = {11, 11, 9};

// t = (b e + g) - h,  u = (a e + g) - h;  a term whose state is null is left out.
struct SparsifyArgs {
  int64_t numel;
  int64_t layers;
  const int64_t* starts;     // [layers + 1] first coordinate of each layer, then numel
  const int* dtype;          // [layers] DType
  const void* const* grads;  // [layers], any alignment
  float* e;                  // [numel] or null
  float* h;                  // [numel] or null
  float a, b;
  int threads;
};

// Takes candidates with key > tau, and the first quota[tile] of each tile with key == tau.
struct EmitArgs {
  const int64_t* candidate_starts;  // [tiles + 1]
  const uint16_t* local;            // [candidates] index in the tile, increasing
  const float* candidates;          // [candidates] u
  uint32_t tau;
  const int64_t* quota;             // [tiles]
  const int64_t* starts;            // [tiles + 1] first entry of each tile in the packet
  bool bitmask;                     // else 16-bit local indices
  int value_dtype;                  // F32 | F16 | BF16
  uint8_t* indices;                 // sections of the packet
  uint8_t* values;
};

struct SparsifyFns {
  // counts[tiles][SPARSIFY_BINS] of the digit at `level` among keys whose earlier digits are
  // `prefix`; false when any t or u is not finite. Writes nothing else.
  bool (*histogram)(const SparsifyArgs&, int level, uint32_t prefix, uint32_t* counts);
  // e <- t; (local, u) of keys >= cut, of keys == cut at most quota[tile] a tile
  void (*collect)(const SparsifyArgs&, uint32_t cut, const int64_t* quota, const int64_t* starts,
                  uint16_t* local, float* candidates);
  void (*emit)(const SparsifyArgs&, const EmitArgs&);
};

// ---- decode: packets into accumulators (csrc/cpu/decode.isa.cpp) -------------------------------

struct SparseView {       // a packet that wire::parse has checked
  const uint8_t* indices;
  const uint8_t* values;
  const int64_t* starts;  // [tiles + 1]
  double weight;
  bool bitmask;
  int value_dtype;
};

struct DecodeArgs {
  int64_t numel;
  int64_t packets;
  const SparseView* views;  // [packets]
  int64_t layers;
  const int64_t* starts;    // [layers + 1] first coordinate of each layer, then numel
  const int* dtype;         // [layers] F64 | F32
  void* const* out;         // [layers], any alignment
  int threads;
};

struct DecodeFns {
  void (*add)(const DecodeArgs&);    // out += sum_p weight_p D_p, in list order
  void (*dense)(const DecodeArgs&);  // out = D_0
};

// ---- crc32c: checksum of packets (csrc/cpu/crc32c.isa.cpp) -------------------------------------

struct Crc32cFns {
  uint32_t (*update)(uint32_t crc, const uint8_t* data, int64_t bytes);
};

// ---- one row per instruction-set level (csrc/cpu/dispatch.cpp) ---------------------------------

struct CpuTable {
  const char* name;
  const CombineFns* combine;
  const ProbeFns* probe;
  const SparsifyFns* sparsify;
  const DecodeFns* decode;
  const Crc32cFns* crc32c;
  const RngFns* rng;
};

const CpuTable& cpu();                        // the row chosen for this process
const CpuTable* cpu_level(const char* name);  // null: not in this build or not usable here
int cpu_levels(const char** names, bool* usable, int capacity);  // best first; returns the count

}  // namespace flcore
