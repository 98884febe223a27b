// The one contract between callers and kernels: plain structs, plain pointers, 64-bit sizes.
// Knows neither Python nor torch nor CUDA headers. CPU kernels and CUDA launchers take the same
// argument structs, so that a variant can replace another without a change in the caller.
#pragma once

#include <cstdint>

#include "philox.h"

namespace flcore {

// Storage types. python/flcore/_arrays.py holds the same codes; tests/test_build.py compares them.
// I8 lies beyond the floating types: rows of int8 with a scale, which `combine` alone reads.
enum DType : int { F64 = 0, F32 = 1, F16 = 2, BF16 = 3, DTYPE_COUNT = 4, I8 = 4, ROW_DTYPE_COUNT = 5 };

constexpr int64_t dtype_bytes(int dtype) {
  return dtype == F64 ? 8 : dtype == F32 ? 4 : dtype == I8 ? 1 : 2;
}

// ---- combine: weighted sum of client rows (csrc/cpu/combine.isa.cpp, kernels/combine.cu) ------

enum Accumulate : int { ACC_F32 = 0, ACC_F64 = 1, ACC_REPRODUCIBLE = 2, ACCUMULATE_COUNT = 3 };

// Grid of the order-independent accumulator: three float64 bins, multiples of these units.
constexpr double BIN_UNIT[3] = {128.0, 0x1p-33, 0x1p-73};
constexpr double BIN_LIMIT = 0x1p46;        // |w x| at and above this is out of range
constexpr int64_t BIN_MAX_TERMS = 1 << 14;  // terms one accumulator can take exactly

enum CombineFlags : int { COMBINE_NONFINITE = 1, COMBINE_OUT_OF_RANGE = 2, STEP_NONFINITE = 4 };

// acc[l][j] = (state ? state[l][j] : 0) + sum_i weights[i] * rows[i * layers + l][j]
//   out given:  out[l][j] = cast(acc[l][j] / divisor) in the layer's dtype; state is only read
//   no out:     state[l][j] = acc[l][j]
// A float64 layer always accumulates in float64 (or reproducibly), the others as `accumulate` says.
// state[l]: float32 or float64 [numel], or float64 [3, numel] bins when reproducible.
struct CombineArgs {
  int64_t n;                  // client rows; weights are not zero (the caller drops such rows)
  int64_t layers;
  const int64_t* numel;       // [layers]
  const int* dtype;           // [layers], DType of the layer in every row (and in out, see out_dtype)
  const void* const* rows;    // [n * layers], any alignment
  const double* weights;      // [n], or [n, layers] when by_layer
  void* const* state;         // [layers] or null
  void* const* out;           // [layers] or null
  int accumulate;             // Accumulate
  double divisor;
  int threads;
  bool check;                 // look for non-finite sums; a CUDA launcher is told by its flag pointer
  int64_t* first_tile;        // [layers + 1] scratch of the CPU kernel
  const int* out_dtype = nullptr;  // [layers], floating; null: as dtype (CPU kernel only, as below)
  bool by_layer = false;           // a row's weight differs from layer to layer
};

// m sums over the same rows, out[k][l][j] = sum_i A[k][i] rows[i][l][j]: each bit for bit the one
// that `combine` gives for the non-zero entries of that line of A.
struct CombineRowsArgs {
  CombineArgs sums;            // without weights, state, out and divisor
  int64_t m;
  const int64_t* starts;       // [m + 1]: line k has the entries starts[k] .. starts[k + 1] - 1,
  const int64_t* index;        //   each a row, increasing within a line
  const double* coefficients;  //   and its coefficient
  void* const* out;            // [m * layers], in the layer's dtype; no row overlaps it
};

enum StepKind : int {
  STEP_SGD = 0,
  STEP_MOMENTUM = 1,
  STEP_ADAGRAD = 2,
  STEP_ADAM = 3,
  STEP_YOGI = 4,
  STEP_KIND_COUNT = 5
};

// One step of a server optimiser along D = sum_i weights[i] x_i / divisor (formulas in cpu/step.h);
// D stays in cache. State is float64 for float64 models, else float32. New buffers may be the old
// ones; STEP_NONFINITE tells that a new value of model or state is not finite.
struct StepArgs {
  CombineArgs sum;                // state and out are null; out_dtype: F64 or F32, that of D
  int kind;                       // StepKind
  bool models;                    // rows are models: x_i - model takes the place of x_i
  double lr, beta1, beta2, tau;
  const int* model_dtype;         // [layers], F64 where D is
  const void* const* model;       // [layers], any alignment, as all that follow
  const void* const* m;           // [layers] or null: sgd has neither, momentum has m
  const void* const* v;
  void* const* new_model;
  void* const* new_m;
  void* const* new_v;
  void* const* copy;              // [layers] or null: the new model once more
  int copy_dtype;                 //   in F16 or BF16
  double noise_std;               // of the normal noise that D gets; 0: none
  PhiloxStream noise;             // its streams, one a layer: tensor is taken from below
  const uint32_t* tensor;         // [layers]
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
  int (*rows)(const CombineRowsArgs&);     // returns CombineFlags
  int (*step)(const StepArgs&);            // returns CombineFlags
};

// ---- rng: stretches of Philox streams (csrc/cpu/rng.isa.cpp, kernels/rng.cu) -------------------

enum RandomForm : int { RANDOM_BITS = 0, RANDOM_UNIFORM = 1, RANDOM_NORMAL = 2, RANDOM_FORM_COUNT };

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
  void (*normal)(const RngArgs&);   // float32, standard normal (box_muller.h)
};

// ---- probe: what this machine's memory and vector units can do (csrc/cpu/probe.isa.cpp) --------

struct ProbeFns {
  uint64_t (*read)(const void* src, int64_t bytes, int threads);
  void (*copy)(void* dst, const void* src, int64_t bytes, int threads);
  // return the operations on one float32 that were done; sink: [threads]
  int64_t (*exchanges)(int64_t rounds, int threads, float* sink);
  int64_t (*products)(int64_t rounds, int threads, float* sink);
  int64_t (*differences)(int64_t rounds, int threads, float* sink);
};

// ---- random numbers of compression: the tensor word of each purpose (reference/streams.py) -------

enum Stream : uint32_t {
  STREAM_ROUNDING = 0x51,
  STREAM_ROTATION = 0x52,
  STREAM_RAND_K = 0x53,
  STREAM_SKETCH = 0x54,
  STREAM_LOW_RANK = 0x55,
  STREAM_STATE = 0x56
};

// ---- feedback: the update and what a client remembers, as every encoder reads them (cpu/feedback.h)

// One affine form, float32, in this order, no fma; a term whose state is null is left out:
//   s = p v + q g        the gradient with its momentum (s = g without v)
//   t = (b e + s) - h    what is left to send
//   u = (a e + s) - h    what is compressed
// and with D the decoded packet: e <- t - D, h <- h + D, v <- s (0 where `mask` and D was sent).
// New state may go to the memory of the old one, or elsewhere so that a failed call changes nothing.
struct FeedbackArgs {
  int64_t numel;
  int64_t layers;
  const int64_t* starts;     // [layers + 1] first coordinate of each layer, then numel
  const int* dtype;          // [layers] DType
  const void* const* grads;  // [layers], any alignment
  const void* e;             // [numel] of state_dtype, or null
  const float* h;            // [numel] or null
  const void* v;             // [numel] of state_dtype, or null
  void* e_new;               // [numel], null where the old one is
  float* h_new;
  void* v_new;
  float a, b, p, q;
  bool mask;
  int state_dtype;           // of e and v: F32, or BF16 rounded stochastically
  PhiloxStream rounding;     // its random bits
  int threads;
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

// ---- select: order statistics of every coordinate (csrc/cpu/select.isa.cpp, kernels/select.cu) --

enum SelectOp : int {
  SELECT_MEDIAN = 0,
  SELECT_TRIMMED_MEAN = 1,  // mean of the sorted values f .. n - f - 1
  SELECT_NEAR_MEDIAN = 2,   // mean of the `keep` values nearest to the median
  SELECT_NEAR_TRIMMED = 3,  // mean of the `keep` values nearest to the trimmed mean
  SELECT_OP_COUNT = 4
};
enum MedianOf : int { MEDIAN_AVERAGE = 0, MEDIAN_LOWER = 1, MEDIAN_UPPER = 2 };  // of an even count

enum SelectFlags : int { SELECT_NONFINITE = 1 };

// y = mix x (or x), then out[l][j] = op(y_0[l][j], .., y_{count-1}[l][j]) in the layer's dtype.
// Values are compared and summed in float32, those of a float64 layer in float64.
struct SelectArgs {
  int64_t n;                  // rows read
  int64_t layers;
  const int64_t* numel;       // [layers]
  const int* dtype;           // [layers], DType of the layer in every row and in out
  const void* const* rows;    // [n * layers], any alignment
  int op, median;             // SelectOp, MedianOf
  int64_t f, keep;
  int64_t count;              // values the op sees: n, or the rows of the mixing matrix
  const int64_t* mix_starts;  // [count + 1] or null: mixed row i has the entries
  const int64_t* mix_rows;    //   mix_starts[i] .. mix_starts[i + 1] - 1, each a row
  const double* mix_values;   //   and its coefficient, applied in this order
  bool propagate;             // a NaN among the values of a coordinate makes the result NaN
  void* const* out;           // [layers]
  int threads;
  int64_t* first_tile;        // [layers + 1] scratch of the CPU kernel
  void* scratch;              // [threads][select_scratch bytes] of the CPU kernel, 64-byte aligned
};

struct SelectFns {
  int (*select)(const SelectArgs&);            // returns SelectFlags
  int64_t (*scratch)(int64_t n, int64_t count);  // bytes one thread needs
};

// ---- gram: squared norms, distances and products of rows (csrc/cpu/gram.isa.cpp, kernels/gram.cu)

enum GramKind : int { GRAM_NORMS = 0, GRAM_DISTANCES = 1, GRAM_PRODUCTS = 2, GRAM_KIND_COUNT = 3 };

// Coordinates are summed in the working precision over one tile: lane c % GRAM_LANES takes
// coordinate c, lanes are added in a fixed tree. The sums of tiles are then added exactly.
constexpr int64_t GRAM_TILE = 1024;
constexpr int GRAM_LANES = 16;

// An exact sum is a fixed-point number: 32-bit digits, held in 64 bits so that carries can wait, the
// first worth 2^GRAM_UNIT; then one word that counts what was not finite. Integers add in any order.
constexpr int GRAM_UNIT_F32 = -149, GRAM_UNIT_F64 = -1074;
constexpr int GRAM_DIGITS_F32 = 11, GRAM_DIGITS_F64 = 68;

constexpr int64_t gram_words(bool wide) { return (wide ? GRAM_DIGITS_F64 : GRAM_DIGITS_F32) + 1; }

// Entries of one segment: norms [n], or the lower triangle by rows [n (n + 1) / 2] whose diagonal
// holds the squared norms.
constexpr int64_t gram_entries(int64_t n, int kind) {
  return kind == GRAM_NORMS ? n : n * (n + 1) / 2;
}

struct GramArgs {
  int64_t n;
  int64_t layers;
  const int64_t* starts;          // [layers + 1] first coordinate of each layer, then the total
  const int* dtype;               // [layers]
  const void* const* rows;        // [n * layers], any alignment
  int kind;                       // GramKind
  bool wide;                      // differences and tile sums in float64
  int64_t segments;
  const int64_t* segment_starts;  // [segments + 1] first coordinate of each segment, then the total
  int64_t* sums;                  // [segments][entries][gram_words], zeroed by the caller, added to
  int threads;
  int64_t* first_chunk;           // [segments + 1] scratch of the CPU kernel
  void* scratch;                  // [threads][gram_scratch bytes], 64-byte aligned
};

struct GramFns {
  void (*gram)(const GramArgs&);
  int64_t (*scratch)(int64_t n, bool wide);  // bytes one thread needs
};

// ---- mask: fixed-point words, masks and sums modulo 2^b (csrc/cpu/mask.isa.cpp) ----------------

constexpr int64_t MASK_LENGTH = int64_t(1) << 36;  // words of one ChaCha20 stream: 2^32 blocks

struct MaskStream {           // a ChaCha20 keystream, RFC 8439
  uint32_t key[8], nonce[3];  // bytes read as little-endian words
  bool negative;              // subtracted, not added
};

// Word j of a message meets word position + j of every stream; position + numel <= MASK_LENGTH.
struct MaskSet {
  int64_t count;
  const MaskStream* streams;  // [count]
  int64_t position;
};

// out[j] = level of scale * x[j] on the grid -clip .. clip of R steps, + masks
struct MaskQuantizeArgs {
  int64_t numel;
  int dtype;              // DType of x
  const void* x;          // any alignment
  uint32_t* out;          // any alignment
  double scale, clip;
  double levels;          // R, an integer below 2^32
  double steps_per_unit;  // R / (2 clip)
  bool stochastic;        // else to the nearest level, ties to even
  PhiloxStream stream;    // of the rounding
  int64_t element;        // position of x[0] in that stream; element + numel <= PHILOX_LENGTH
  MaskSet masks;
  uint32_t keep;          // 2^b - 1
  int threads;
};

struct MaskAddArgs {
  int64_t numel;
  const uint32_t* words;  // may be out
  uint32_t* out;
  MaskSet masks;
  uint32_t keep;
  int threads;
};

struct MaskSumArgs {
  int64_t n, numel;
  const uint32_t* const* rows;  // [n], any alignment
  uint32_t* acc;                // [numel]
  bool fresh;                   // acc counts as zeros and is not read
  uint32_t keep;
  int threads;
};

// out[j] = (2 words[j] - top) * factor
struct MaskDequantizeArgs {
  int64_t numel;
  const uint32_t* words;
  double top;     // n R, at most 2^32
  double factor;
  int dtype;      // DType of out
  void* out;
  int threads;
};

struct MaskFns {
  int64_t (*quantize)(const MaskQuantizeArgs&);  // values clipped; -1: x holds a NaN or an infinity
  void (*add)(const MaskAddArgs&);
  void (*sum)(const MaskSumArgs&);
  int64_t (*dequantize)(const MaskDequantizeArgs&);  // words above top
};

// ---- moments: mean and squared deviations of layers, affine maps (csrc/cpu/moments.isa.cpp) -----

// A tile is a fixed part of a layer and lane c % MOMENT_LANES takes its coordinate c, so that
// neither vector width nor threads nor device changes a bit. pykernels/moments.py holds the same
// numbers.
constexpr int64_t MOMENT_TILE = 4096;
constexpr int MOMENT_LANES = 16;

enum MomentsOf : int {
  MOMENTS_ROWS = 0,   // of x
  MOMENTS_ADD = 1,    // of x, and acc += row_weight * x in the same read
  MOMENTS_BLEND = 2,  // of z = acc_weight * acc + row_weight * x; x is not read at row_weight 0
  MOMENTS_OF_COUNT = 3
};

// mean[i][l] and m2[i][l] = sum (value - mean)^2 of layer l of row i, 0 for a layer of no values
struct MomentsArgs {
  int64_t n, layers;
  const int64_t* numel;     // [layers]
  const int* dtype;         // [layers] DType of the rows
  const void* const* rows;  // [n * layers], any alignment
  int of;                   // MomentsOf; n is 1 unless MOMENTS_ROWS
  void* const* acc;         // [layers] float64 for a float64 layer, else float32; or null
  double acc_weight, row_weight;
  double* mean;             // [n * layers]
  double* m2;               // [n * layers]
  int64_t* first_tile;      // [layers + 1] scratch
  double* tiles;            // [n * tiles][3] scratch: pivot p, mean - p and m2 of each tile
  int threads;
};

// out = scale_l * z + shift_l in the layer's dtype; z = x, or the blend of MomentsArgs
struct AffineArgs {
  int64_t layers;
  const int64_t* numel;     // [layers]
  const int* dtype;         // [layers] DType of row and out
  const void* const* row;   // [layers]
  const void* const* acc;   // [layers] or null: z = x
  double acc_weight, row_weight;
  const double* scale;      // [layers]
  const double* shift;      // [layers]
  void* const* out;         // [layers]; may be row
  int64_t* first_tile;      // [layers + 1] scratch
  int threads;
};

struct MomentsFns {
  void (*moments)(const MomentsArgs&);
  void (*merge)(const MomentsArgs&);  // the second half of it: mean and m2 from finished tiles
  bool (*affine)(const AffineArgs&);  // true when a value of out is not finite
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
  const MomentsFns* moments;
  const MaskFns* mask;
  const SelectFns* select;
  const GramFns* gram;
};

const CpuTable& cpu();                        // the row chosen for this process
const CpuTable* cpu_level(const char* name);  // null: not in this build or not usable here
int cpu_levels(const char** names, bool* usable, int capacity);  // best first; returns the count

}  // namespace flcore
