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

struct PacketView;  // a checked packet, see decode

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
  const PacketView* packets = nullptr;  // [n]: float32 rows that are decoded on the way; no `rows`;
                                        //   their weight is weights[i] unless by_layer
  const int64_t* starts = nullptr;      //   [layers + 1] first coordinate of each layer, the total
  void* scratch = nullptr;              //   [threads][combine_scratch bytes], 64-byte aligned
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
  STEP_LINEAR = 5,
  STEP_KIND_COUNT = 6
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
  void* const* new_sum = nullptr;  // [layers], packets only: sum.state is read before the packets are
};                                 //   added, and the sums, not divided yet, go here

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
  int64_t (*scratch)(const CombineArgs&);  // bytes one thread needs for packets
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
constexpr int64_t SPARSE_RUN = 32;      // neighbours that a sample takes together: two cache lines

// How many of `length` coordinates a sample of one run in `step` takes, the one at `phase`.
constexpr int64_t sparse_samples(int64_t length, int64_t step, int64_t phase) {
  const int64_t period = SPARSE_RUN * step, rest = length % period - SPARSE_RUN * phase;
  return length / period * SPARSE_RUN + (rest < 0 ? 0 : rest < SPARSE_RUN ? rest : SPARSE_RUN);
}

// Digits of the 31-bit key of |u|, from the top.
constexpr int SPARSIFY_LEVELS = 3, SPARSIFY_BINS = 2048;
constexpr int SPARSIFY_SHIFT[SPARSIFY_LEVELS] = {20, 9, 0};
constexpr int SPARSIFY_WIDTH[SPARSIFY_LEVELS] = {11, 11, 9};

// Coordinates inside one tile of the packet and one segment of the selection.
struct SparsePiece {
  int64_t begin, end;
  int64_t segment;
};

// Pieces in order, cut into lanes: a lane is the work of one thread.
struct SparsePieces {
  int64_t count;
  const SparsePiece* piece;  // [count]
  int64_t lanes;
  const int64_t* lane;       // [lanes + 1] first piece of each lane
  int threads;
};

// Entries that may be selected. Those of a piece lie together, those of a lane in its own region.
struct SparseCandidates {
  const int64_t* region;  // [lanes + 1]
  int64_t* from;          // [pieces] first entry of a piece
  int64_t* count;         // [pieces]
  uint16_t* local;        // [region[lanes]] index in the tile of the packet, increasing in a piece
  float* u;               // [region[lanes]]
  float* t;               // [region[lanes]], null without e
};

// The entries of a packet, tile after tile.
struct SparseEntries {
  const int64_t* starts;  // [tiles + 1] first entry of each tile
  const uint16_t* local;  // [entries] index in the tile, increasing
  const float* u;         // [entries] what is compressed
  const float* t;         // [entries] what is left to send; null without e
};

// Segments of at most SPARSE_TILE coordinates each, selected one by one in cache.
struct SmallSegment {
  int64_t begin, end;
  int64_t k, rank;   // entries wanted; the one whose key is asked for
  int64_t at;        // where they go in local, u, t
  int64_t low;       // out: entries in the first tile that the segment touches
  int64_t found;     // out: entries in all: those of the k that reach the floor
  uint32_t tau;      // out: key of entry `rank`, 0 when it does not reach the floor
};

struct SmallArgs {
  int64_t count;
  SmallSegment* segment;  // [count]
  int64_t lanes;
  const int64_t* lane;    // [lanes + 1] first segment of each lane
  uint32_t floor;         // smallest key that is taken
  bool check;             // only look whether everything is finite
  uint16_t* local;        // [entries]
  float* u;
  float* t;               // null without e
  float* scratch;         // [lanes][small_scratch floats]
  int64_t longest;        // coordinates of the longest segment
  int threads;
};

enum SweepFlags : int { SWEEP_NONFINITE = 1, SWEEP_FULL = 2 };

struct EmitArgs {
  SparseEntries entries;
  int index;        // IndexCoding; indices are written here when BITMASK or TILE16
  int value_dtype;  // F32 | F16 | BF16 | WIRE_INT8
  uint8_t* scales;  // sections of the packet; scales only with int8: a float32 a tile
  uint8_t* indices;
  uint8_t* values;
};

struct SparsifyFns {
  // counts[pieces][SPARSIFY_BINS] of the digit at `level` among keys whose earlier digits are
  // prefix[piece]; false when any t or u is not finite. Writes nothing else.
  bool (*histogram)(const FeedbackArgs&, const SparsePieces&, int level, const uint32_t* prefix,
                    uint32_t* counts);
  // e_new <- t, v_new <- s; candidates with key >= cut[piece], of key == cut at most quota[piece].
  // SWEEP_FULL: a region is too small; then, and when a value is not finite, the new state is void.
  int (*sweep)(const FeedbackArgs&, const SparsePieces&, const uint32_t* cut, const int64_t* quota,
               const SparseCandidates& out);
  // The k-th largest key among the candidates of pieces first .. last - 1, all of them >= cut;
  // scratch: as many words as there are candidates.
  uint32_t (*kth)(const SparsePieces&, const SparseCandidates&, int64_t first, int64_t last,
                  uint32_t cut, int64_t k, uint32_t* scratch);
  // Candidates of each piece with key > tau[piece], and with key == tau[piece].
  void (*count)(const SparsePieces&, const SparseCandidates&, const uint32_t* tau, int64_t* above,
                int64_t* ties);
  // Copies candidates with key > tau[piece] and the first quota[piece] with key == tau[piece], in
  // order, to at[piece] and on; a piece whose quota is negative is left out. above: as from count.
  void (*pick)(const SparsePieces&, const SparseCandidates&, const uint32_t* tau,
               const int64_t* quota, const int64_t* at, const int64_t* above, uint16_t* local,
               float* u, float* t);
  // Selects in each segment, writes its state (unless `check`); false when not finite.
  bool (*small)(const FeedbackArgs&, const SmallArgs&);
  int64_t (*small_scratch)(int64_t longest);  // floats a lane
  // Writes indices and values of every tile and corrects the new state at the entries.
  void (*emit)(const FeedbackArgs&, const EmitArgs&);
  // Keys of coordinates [begin, end) in runs of SPARSE_RUN: of `step` runs the one at `phase`. NaN
  // and infinity count as large numbers. keys: [sparse_samples]
  void (*sample)(const FeedbackArgs&, int64_t begin, int64_t end, int64_t step, int64_t phase,
                 uint32_t* keys);
  // The k-th largest key, 1 <= k <= count; the order of the keys is lost.
  uint32_t (*ranked)(uint32_t* keys, int64_t count, int64_t k);
};

// ---- codecs: what the bytes of a packet mean (wire.h has the same numbers) ---------------------

enum CodecId : int {
  CODEC_DENSE = 0,
  CODEC_SPARSE = 1,
  CODEC_SIGN = 2,
  CODEC_UNIFORM = 3,
  CODEC_AFFINE = 4,
  CODEC_NATURAL = 5,
  CODEC_MINIFLOAT = 6,
  CODEC_TERNARY = 7,
  CODEC_ROTATED = 8,
  CODEC_LOW_RANK = 9,
  CODEC_SKETCH = 10,
  CODEC_THC = 11
};

enum WireValue : int { WIRE_INT8 = 4, WIRE_E8M0 = 5 };  // value types of the wire beyond DType

constexpr int64_t BUCKET_MAX = 65536;
constexpr int64_t BLOCK_MAX = 4096;         // bucket of a codec whose buckets decode only as a whole
constexpr double WIRE_LARGEST = 3.402823e38;  // no code may decode to more

// ---- quantize: feedback, one code a coordinate, state update (csrc/cpu/quantize.isa.cpp) --------

// How a bucket's scale is found, where a codec has a choice.
enum Measure : int {
  MEASURE_DEFAULT = 0,   // sign: mean magnitude; uniform, ternary: largest; affine: both ends
  MEASURE_L2 = 1,        // sign, uniform: Euclidean norm (over sqrt(n) for sign)
  MEASURE_TWO_MEANS = 2  // affine, 1 bit: the means of negative and of other values
};

// Settings of a codec of buckets.
struct CodecArgs {
  int codec;              // CodecId
  int form, bits;         // bytes 54 and 55 of the header
  int64_t bucket;         // coordinates of a bucket, 1 .. BUCKET_MAX; the last one may be shorter
  int scale_dtype;        // byte 53: DType or WireValue
  int64_t scale_stride;   // bytes of the scales of a bucket
  int64_t code_stride;    // bytes of the codes of a whole bucket
  int measure;            // Measure
  bool stochastic;        // rounded with the bits of `rounding`, else half to even
  int64_t levels;         // uniform: positive levels in use, at most 2^(bits - 1) - 1
  double clip;            // ternary: root mean squares of the bucket, 0: no clipping
  PhiloxStream rounding;  // STREAM_ROUNDING, 16 bits a coordinate
  PhiloxStream rotation;  // STREAM_ROTATION
  const void* extra;      // what one codec alone needs; its header says what
};

struct QuantizeArgs {
  FeedbackArgs feedback;
  CodecArgs codec;
  bool check;       // look at every value before anything of the state is written: it is in place
  uint8_t* scales;  // sections of the packet
  uint8_t* codes;
  float* scratch;   // [threads][quantize_scratch floats], 64-byte aligned
};

struct QuantizeFns {
  // False when t or u is not finite somewhere: packet and new state are then void.
  bool (*quantize)(const QuantizeArgs&);
  int64_t (*scratch)(const QuantizeArgs&);  // floats one thread needs, a multiple of 16
};

// ---- indices: positions within tiles in few bits (csrc/cpu/indices.isa.cpp) ----------------------

enum IndexCoding : int {
  INDEX_SEEDED = 0,   // none: the coordinates follow from seed and round
  INDEX_BITMASK = 1,
  INDEX_TILE16 = 2,
  INDEX_BITPACK = 3,
  INDEX_RICE = 4
};

constexpr int64_t INDEX_GROUP = 128;  // gaps that share a width in bitpack
constexpr int INDEX_WIDTH_MAX = 16;
constexpr int RICE_PARAMETER_MAX = 15;
constexpr int64_t RICE_BYTES_MAX = SPARSE_TILE / 8;  // with parameter 0 a tile needs no more

// What is wrong with the bits of a tile.
enum IndexFaultKind : int {
  INDEX_FINE = 0,
  INDEX_BEYOND = 1,   // a coordinate lies behind the tile
  INDEX_LENGTH = 2,   // the codes do not end in the tile's last byte
  INDEX_PADDING = 3,  // a pad bit is set
  INDEX_WIDE = 4,     // a width larger than its gaps need
  INDEX_FAULTS = 5
};
struct IndexFault {
  int64_t tile;
  int kind;  // IndexFaultKind
};

struct IndexArgs {
  int64_t numel;
  int coding;             // INDEX_BITPACK | INDEX_RICE
  const int64_t* starts;  // [tiles + 1] first entry of each tile
  const int64_t* groups;  // [tiles + 1] first group of each tile; bitpack only
  uint8_t* parameters;    // a width of each group, or the Rice parameter of each tile; in range
  const int64_t* at;      // [tiles + 1] first byte of each tile in the section; not for measure
  int threads;
};

struct IndicesFns {
  // local: [entries] increasing within each tile. Fills parameters and the bytes of each tile.
  void (*measure)(const IndexArgs&, const uint16_t* local, int64_t* bytes);
  void (*encode)(const IndexArgs&, const uint16_t* local, uint8_t* section);
  // Any bytes: reads none outside of the tiles. The first tile that is not as it must be.
  IndexFault (*decode)(const IndexArgs&, const uint8_t* section, uint16_t* local);
};

// ---- lut_add: packets of THC codes added as integers (csrc/cpu/lut_add.isa.cpp, cpu/codes_thc.h) ---

constexpr int THC_LARGEST = 255;  // of a table's values: a byte holds them

// What a THC encoder needs beside CodecArgs, of which it is `extra`.
struct ThcArgs {
  const float* norms;     // l of every block, or one for all; the same for all clients
  bool shared;            // one for all
  int64_t numel;          // coordinates of the update
  float clip;             // t: rotated values are cut at so many standard deviations
  const uint16_t* table;  // [2^bits] increasing from 0 to at most THC_LARGEST
};

// sums[j] = sum_i table_i[code j of packet i]
struct LutAddArgs {
  int64_t codes;                  // of each packet: `bits` wide, packed little-endian
  int bits;                       // 2 or 4
  int64_t n;
  const uint8_t* const* packets;  // [n] packed codes, any alignment
  const uint8_t* tables;          // [n][16]
  int lane_bytes;                 // of a sum: 1, 2 or 4, unsigned; the caller knows that they fit
  void* sums;                     // [codes], any alignment
  int threads;
};

// out = S Had(2 sums - top) factor in each block, as dequantize_thc for one packet
struct LutDecodeArgs {
  int64_t numel, block;
  int lane_bytes;
  const void* sums;      // codes of all blocks, the last one filled up to a power of two
  int64_t top;           // twice the middle of a sum; top * block < 2^31
  double total;          // weights of the sum
  const float* norms;    // as ThcArgs
  bool shared;
  float clip;
  int g;
  PhiloxStream rotation;
  float* out;            // [numel]
  int threads;
};

// squares[b] = sum u u over block b, in float64
struct BlockNormArgs {
  FeedbackArgs feedback;
  int64_t block;     // coordinates, at most BLOCK_MAX
  double* squares;   // [blocks]
  float* scratch;    // [threads][FEEDBACK_PARTS * block]
};

struct LutAddFns {
  void (*add)(const LutAddArgs&);
  void (*decode)(const LutDecodeArgs&);
  bool (*norms)(const BlockNormArgs&);  // false when t or u is not finite somewhere
};

// ---- randk: coordinates that follow from a seed (csrc/cpu/randk.isa.cpp) -------------------------

constexpr int PERMUTE_ROUNDS = 8;
constexpr int PERMUTE_BITS_MIN = 8;            // fewer would not mix
constexpr int64_t PERMUTE_CHUNK = 4096;

// A keyed permutation of [0, 2^(left + right)); its images below numel are wanted.
struct PermuteArgs {
  int64_t numel;
  int left, right;  // bits of the halves, each 4 to 24
  uint32_t keys[2 * PERMUTE_ROUNDS];
};

// u[j] = scale * u and t[j] of the feedback at each coordinate of a list; new state e <- t, v <- s.
struct GatherArgs {
  FeedbackArgs feedback;
  const int64_t* starts;  // [tiles + 1] first entry of each tile
  const uint16_t* local;  // [entries] index in the tile, increasing
  float scale;
  bool check;             // look at every value before anything of the state is written
  float* u;               // [entries]
  float* t;               // [entries] or null
};

struct RandkFns {
  // `chunks` pieces of PERMUTE_CHUNK numbers from `first`: the images below numel of piece c, in
  // order, at images + c * PERMUTE_CHUNK, and how many in counts[c].
  void (*permute)(const PermuteArgs&, int64_t first, int64_t chunks, uint64_t* images,
                  int64_t* counts, int threads);
  // Sorts the entries of each tile; with `others`, writes the coordinates that are not among them.
  void (*order)(int64_t numel, const int64_t* in_starts, const uint16_t* in,
                const int64_t* out_starts, uint16_t* out, bool others, int threads);
  // False when t, u or scale * u is not finite somewhere: new state is then void.
  bool (*gather)(const GatherArgs&);
};

// ---- decode: packets into accumulators (csrc/cpu/decode.isa.cpp) -------------------------------

struct LowRankLayer;

struct PacketView {  // a packet that wire::parse has checked; sections that it lacks are null
  int codec;         // CodecId
  int form, bits;    // bytes 54 (index coding of a sparse packet) and 55 of the header
  int value_dtype;   // byte 53: of values, scales or factors
  double weight;
  int64_t numel;
  int64_t bucket;    // tile, bucket, block or rank
  uint64_t seed, round;
  int64_t k;         // values it holds
  // buckets
  const uint8_t* scales;
  const uint8_t* codes;
  int64_t scale_stride, code_stride;  // bytes of a whole bucket's
  const uint8_t* codebook;
  const uint8_t* norm;
  // sparse
  const uint8_t* indices;
  const uint8_t* values;
  const int64_t* starts;  // [tiles + 1] first entry of each tile
  bool bitmask;
  // low rank
  const uint8_t* factor_p;
  const uint8_t* factor_q;
  const LowRankLayer* matrices;  // [matrix_count] layers in order of their coordinates
  int64_t matrix_count;
};

struct DecodeArgs {
  int64_t numel;
  int64_t packets;
  const PacketView* views;  // [packets]
  int64_t layers;
  const int64_t* starts;    // [layers + 1] first coordinate of each layer, then numel
  const int* dtype;         // [layers] F64 | F32
  void* const* out;         // [layers], any alignment
  int threads;
};

// Floats of working memory that decoding on one thread needs.
constexpr int64_t DECODE_WORK = 4 * BLOCK_MAX;

struct DecodeFns {
  void (*add)(const DecodeArgs&);    // out += sum_p weight_p D_p, in list order
  void (*dense)(const DecodeArgs&);  // out = D_0
  // row i of out = coordinates [begin, begin + count) of D_i, on the calling thread; stride: floats
  // from row to row; work: [DECODE_WORK], 64-byte aligned. For kernels that work on tiles of packets.
  void (*rows)(const PacketView* views, int64_t n, int64_t begin, int64_t count, float* out,
               int64_t stride, float* work);
  // `add` for coordinates [begin, end) on the calling thread; where a packet is sparse they are a
  // tile of it
  void (*add_part)(const DecodeArgs&, int64_t begin, int64_t end);
};

// ---- low_rank: power iteration on the matrices of an update (csrc/cpu/low_rank.isa.cpp) ---------

constexpr int LOW_RANK_MAX = 32;
constexpr int64_t LOW_RANK_ROWS = 64, LOW_RANK_COLUMNS = 1024;  // a tile: the unit of rounding too

// One layer as a matrix of n rows and m columns, D = P Q^T; rank 0: n = 1, and D is its values.
struct LowRankLayer {
  int64_t start;   // first coordinate
  int64_t n, m;
  int64_t rank;    // at most LOW_RANK_MAX
  int64_t p, q;    // first element among the factors: P [n][rank], Q^T [rank][m]
  int64_t values;  // first element among the values
};

struct LowRankArgs {
  const FeedbackArgs* feedback;
  int64_t layers;
  const LowRankLayer* layer;    // [layers], covering all coordinates in order
  const int64_t* first_tile;    // [layers + 1] tiles of the layers before
  const int64_t* first_column;  // [layers + 1] columns of tiles of the layers before
  bool keep;                    // project and back: e <- t (0 where values are sent) in the same read
  int value_dtype;              // of the values: F32 or BF16
  uint8_t* values;              // or null
};

struct LowRankFns {
  // partial[p columns + c n rank ..][n][rank] = U Q over tile column c; top[tile] = largest |t|, |h| of
  // the tile, infinite when t or u is not finite
  void (*project)(const LowRankArgs&, const float* q, double* partial, float* top);
  // p [rank][n] at layer.p = their sums
  void (*sum_columns)(const LowRankArgs&, const double* partial, double* p);
  // partial[row of tiles][rank][m] = U^T P over a row of tiles; top as above, or null
  void (*back)(const LowRankArgs&, const float* p, const int64_t* first, float* partial, float* top);
  // q [rank][m] at layer.q = their sums
  void (*sum_rows)(const LowRankArgs&, const float* partial, const int64_t* first, double* q);
  // Gram-Schmidt on x [rank][length] of each layer, twice; a vector that depends on others becomes 0
  void (*orthonormalise)(const LowRankArgs&, bool columns, double* x);
  // state and values after D = P Q^T
  void (*apply)(const LowRankArgs&, const float* p, const float* q);
};

// ---- sketch: count sketches and what they tell (csrc/cpu/sketch.isa.cpp) ------------------------

constexpr int SKETCH_ROWS = 9;  // most rows; always odd

// Where coordinate j goes in row i, from word j of stream (seed, 0, STREAM_SKETCH, i): bit 0 is the
// sign (1 = minus), the other 31 bits times `columns`, over 2^31, the column.
struct SketchHash {
  uint64_t seed;
  int64_t rows, columns;
};

// cells[i][column] += sign * u, one after the other within a part of the coordinates; then the parts
// in order. Parts are runs of blocks of 1024 coordinates, as many as possible alike.
struct SketchArgs {
  const FeedbackArgs* feedback;  // the update; no state
  SketchHash hash;
  int64_t parts;
  float* cells;  // [rows][columns]
  float* more;   // [parts - 1][rows][columns] scratch
};

struct SketchTable {
  SketchHash hash;
  int64_t numel;
  const float* cells;  // [rows][columns], any alignment
  int threads;
};

struct SketchFns {
  bool (*sketch)(const SketchArgs&);  // false: a value of the update is not finite
  void (*estimate)(const SketchTable&, int64_t begin, int64_t count, float* out);
  // counts[tiles][SPARSIFY_BINS]: digit at `level` of |estimate|'s key, as in sparsify
  void (*histogram)(const SketchTable&, int level, uint32_t prefix, uint32_t* counts);
  // estimates with key >= cut, of those with key == cut at most quota[tile] a tile
  void (*collect)(const SketchTable&, uint32_t cut, const int64_t* quota, const int64_t* starts,
                  int64_t* index, float* values);
  // cells[i][column of index[j]] += sign * values[j] in order of j, or = 0 without values
  void (*scatter)(const SketchHash&, const int64_t* index, const float* values, int64_t count,
                  float* cells, int threads);
};

// ---- crc32c: checksum of packets (csrc/cpu/crc32c.isa.cpp) -------------------------------------

struct Crc32cFns {
  uint32_t (*update)(uint32_t crc, const uint8_t* data, int64_t bytes, int threads);
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
  const PacketView* packets = nullptr;  // [n]: float32 rows that are decoded on the way; no `rows`
  const int64_t* starts = nullptr;      //   [layers + 1] first coordinate of each layer, the total
};

struct SelectFns {
  int (*select)(const SelectArgs&);            // returns SelectFlags
  int64_t (*scratch)(const SelectArgs&);       // bytes one thread needs
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
  const PacketView* packets = nullptr;  // [n]: float32 rows that are decoded on the way; no `rows`
};

struct GramFns {
  void (*gram)(const GramArgs&);
  int64_t (*scratch)(const GramArgs&);  // bytes one thread needs
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

// ---- vote: majority of packed signs (csrc/cpu/vote.isa.cpp) --------------------------------------

enum VoteForm : int {
  VOTE_BITS = 0,   // bit 1 = negative, ties 0; pad bits 0
  VOTE_SIGNS = 1,  // float32 -1, 0 for a tie, +1
  VOTE_SUM = 2,    // float32 sum_i w_i s_i
  VOTE_FORM_COUNT = 3
};

struct VoteRow {
  const uint8_t* bits;  // bucket after bucket, each from a byte on; bit 1 = negative
  int64_t bucket;
  double weight;
};

struct VoteArgs {
  int64_t n, numel;     // n >= 1
  const VoteRow* rows;  // [n]
  bool weighted;        // else every row counts as one
  int form;             // VoteForm
  void* out;            // uint8 [(numel + 7) / 8], or float32 [numel] at any alignment
  int threads;
  void* scratch;        // [threads][vote_scratch bytes], 64-byte aligned
};

struct VoteFns {
  void (*vote)(const VoteArgs&);
  int64_t (*scratch)(int64_t n);  // bytes one thread needs
};

// ---- perp_grad: gradients without their part along the weights (csrc/cpu/perp_grad.isa.cpp) ------

// Sums in float64: lane c % PERP_LANES of a tile takes its coordinate c, lane t % PERP_JOIN of a
// tensor its tile t; lanes are added in a tree. pykernels/perp_grad.py holds the same numbers.
constexpr int64_t PERP_TILE = 4096;
constexpr int PERP_LANES = 16, PERP_JOIN = 128;
constexpr double PERP_CANCELS = 1e-8;   // of ||g||^2: below, ||g - c w||^2 is measured
constexpr double PERP_NOTHING = 1e-13;  // of ||g||: below, what remains is rounding of the sums

enum PerpStep : int {
  PERP_PROJECT = 0,  // all of it
  PERP_SUMS = 1,     // fills sums
  PERP_REST = 2,     // from sums: fills rest where it is needed; returns whether it is
  PERP_APPLY = 3,    // from sums and rest: writes grad
  PERP_STEP_COUNT = 4
};

struct PerpFactors {  // grad <- alpha (grad - c weight)
  double c, alpha;
  bool apply, measure;
};

struct PerpGradArgs {
  int step;                    // PerpStep
  int64_t layers;
  const int64_t* numel;        // [layers]
  const int* dtype;            // [layers] DType of weight and grad
  const void* const* weight;   // [layers], any alignment
  void* const* grad;           // [layers], shares no memory with another one or with a weight
  bool global;                 // one projection for all tensors, else one for each
  bool renormalize;
  double eps, floor;
  double* sums;                // [layers][3] w.w, w.g, g.g
  double* rest;                // [layers][3] ||g - c w||^2 first; 0 where it is not needed
  PerpFactors* factors;        // [layers] scratch, at least one
  int64_t* first_tile;         // [layers + 1] scratch
  double* tiles;               // [tiles of all tensors][3] scratch
  int threads;
};

struct PerpGradFns {
  bool (*perp_grad)(const PerpGradArgs&);
};

// ---- local_step: what a client does to its parameters (csrc/cpu/local_step.isa.cpp) ------------

// The pieces of a group (the tensors of one model, or one row of a matrix) share a norm and numbers.
// With v = alpha g + q, s = 1 unless told otherwise, all in the dtype (16-bit types: float32):
//   STEP     b = scale v + decay x, or with `full` scale (v + decay x); state = momentum state + b;
//            x -= rate d, d = b without state, state with it, b + momentum state with `nesterov`
//            scale = 1, or clip / ||v|| (`full`: ||v + decay x||) where the norm is above clip
//   NORM     norms = ||v||
//   SHIFT    out = x + rate v
//   SAM      out = x + rate / (||v|| + eps) v
//   UPDATE   out = x - g
//   DUAL     out = x - g;  state += out
//   CONTROL  out = x - g;  state = (state - q) - rate out
enum LocalKind : int {
  LOCAL_STEP = 0,
  LOCAL_NORM = 1,
  LOCAL_SHIFT = 2,
  LOCAL_SAM = 3,
  LOCAL_UPDATE = 4,
  LOCAL_DUAL = 5,
  LOCAL_CONTROL = 6,
  LOCAL_KIND_COUNT = 7
};

// Sums of squares in float64: lane c % LOCAL_LANES of a tile takes its coordinate c, lane
// t % LOCAL_JOIN of a group its tile t; lanes are added in a tree. pykernels/local_step.py too.
constexpr int64_t LOCAL_TILE = 4096;
constexpr int LOCAL_LANES = 16, LOCAL_JOIN = 128;

struct LocalNumbers {  // of one group
  double rate, alpha, decay, clip, momentum;
};

struct LocalArgs {
  int kind;                     // LocalKind
  int64_t count;                // groups that take part,
  const int64_t* group;         //   [count] and which
  const int64_t* first_piece;   // [groups + 1]: group k has pieces first_piece[k] .. - 1
  const int64_t* first_tile;    // [pieces + 1] tiles of all pieces before
  const int64_t* numel;         // [pieces]
  const int* dtype;             // [pieces] DType
  void* const* x;               // [pieces], any alignment, as all that follow; STEP writes it
  const void* const* g;         // [pieces]
  const void* const* q;         // [pieces] or null
  void* const* state;           // [pieces] or null
  void* const* out;             // [pieces] or null; may be one of the others
  const LocalNumbers* numbers;  // [groups]
  double eps;
  bool clipped, full, nesterov, first;  // first: the state is written without being read
  double* norms;                // [groups]
  double* tiles;                // [tiles of all pieces] scratch, null with one thread
  int threads;
};

struct LocalStepFns {
  void (*run)(const LocalArgs&);
};

// ---- rowloss: cross-entropies of rows of logits, with gradient (csrc/cpu/rowloss.isa.cpp) ------

enum RowMap : int { ROW_SOFTMAX = 0, ROW_STABLEMAX = 1, ROW_TAYLOR = 2, ROW_MAP_COUNT = 3 };

// Element (i, k) of x lies at (i / inner) outer_stride + (i % inner) row_stride + k class_stride,
// in elements; grad likewise. The compute type is float, double for F64. The formulas are told in
// rowloss.isa.cpp.
struct RowLossArgs {
  int64_t rows, classes;
  int map, dtype;              // RowMap; DType of x, grad and soft
  const void* x;
  int64_t inner, outer_stride, row_stride, class_stride;
  void* grad;                  // null: none; may be x itself, with the same strides
  int64_t grad_outer_stride, grad_row_stride, grad_class_stride;
  const void* labels;          // int32 or int64 [rows], or null
  int label_bytes;
  const void* soft;            // [rows, classes] targets that are probabilities, or null
  const uint8_t* valid;        // [rows] or null: rows whose label is not ignore_index
  int64_t ignore_index, label_offset;
  bool shard;                  // a label outside [offset, offset + classes) is another shard's
  const void* weight;          // of the classes, compute type, or null
  const void* prior;           // its logarithm for softmax, itself for the others, or null
  const void* row_scale;       // compute type [rows] in the place of logit_scale, or null
  double weight_sum, classes_present;
  double smoothing, logit_scale, margin, z_loss, tau;
  const void* upstream;        // compute type [rows] or null
  double grad_scale;           // gradient: grad_scale * upstream[i] * dloss[i] / dx
  void* loss;                  // compute type [rows], as the three that follow; null: not wanted
  void* rest;                  // sum over the classes but the target; read by backward
  void* own;                   // the target's term
  void* shift;                 // softmax: both are multiples of exp(shift)
  int threads;
  void* scratch = nullptr;     // scratch(args) bytes, 64-byte aligned
};

// One visit to labels: rows that count, the sum of their weights, and the first row with a label
// that is no class or whose class the prior masks (-1: none).
struct RowTargetsArgs {
  const void* labels;
  int label_bytes;
  int64_t rows;
  const uint8_t* valid;        // as above
  int64_t ignore_index, label_offset, classes;
  const void* weight;          // float or double [classes], or null
  const void* prior;
  bool is_float64, prior_is_log;
};
struct RowTargets {
  int64_t count;
  double weight_total;
  int64_t first_bad;
};

struct RowLossFns {
  void (*forward)(const RowLossArgs&);   // loss, rest, own, shift
  void (*both)(const RowLossArgs&);      // these and the gradient, x read once
  void (*backward)(const RowLossArgs&);  // the gradient from x, rest, own, shift
  int64_t (*scratch)(const RowLossArgs&);
  RowTargets (*targets)(const RowTargetsArgs&);
};

// ---- stablemax: probabilities along a dimension, collapse (csrc/cpu/stablemax.isa.cpp) ----------

enum StableMaxStep : int {
  STABLEMAX_FORWARD = 0,       // out = p
  STABLEMAX_LOG = 1,           // out = log p
  STABLEMAX_BACKWARD = 2,      // out = gradient of x from v, that of p
  STABLEMAX_LOG_BACKWARD = 3,  // out = gradient of x from v, that of log p
  STABLEMAX_STEP_COUNT = 4
};

// Element (i, k) lies at (i / inner) outer + (i % inner) row + k cls, in elements.
template <class Data>
struct RowPlace {
  Data* data;
  int64_t outer, row, cls;
};

struct StableMaxArgs {
  int step, dtype;             // StableMaxStep; DType of all arrays
  int64_t rows, classes, inner;
  RowPlace<const void> x, v;   // v: backward only. Either cls is 1 in all arrays, or row is
  RowPlace<void> out;          // may be x or v, in the same place
  int threads;
};

struct CollapseCounts {
  int64_t rows, collapsed, zero_loss, stablemax;
  double largest;              // |x| of what is not -inf
  bool has_nan;
};

struct CollapseArgs {
  int64_t rows, classes;
  int dtype;
  const void* x;               // element (i, k) at i row_stride + k
  int64_t row_stride;
  const int64_t* labels;       // [rows]; rows with ignore_index are not read
  int64_t ignore_index;
  double unit;                 // unit roundoff
  CollapseCounts* found;       // [tasks]
  int64_t tasks;               // parts that the rows are cut into
  int threads;
};

struct StableMaxFns {
  void (*stablemax)(const StableMaxArgs&);
  void (*collapse)(const CollapseArgs&);
};

// ---- qmatmul: products with a weight of 2 to 8 bits (csrc/cpu/qmatmul*.isa.cpp) -----------------

enum QWeightKind : int {
  QW_INT = 0,         // w = (q - zero) scale, zero an integer
  QW_FLOAT_ZERO = 1,  // w = fma(q - 2^(bits - 1), scale, zero)
  QW_TABLE = 2,       // w = table[q] scale, 4 bits
  QW_E4M3 = 3,        // w = fp8(q) scale, 8 bits
  QW_E5M2 = 4,
  QW_KIND_COUNT = 5
};

// W [n, k] in the layout tile16: blocks of 16 rows, chunks of 32 k, both padded. A chunk of a block
// has 64 * bits bytes; dword lane r of a vector of 64 bytes belongs to row r of the block, its byte
// i to k = i (mod 4):
//   8 bits: vector v holds k = 4v + i        4 bits: 8v + i low, 8v + 4 + i high nibble
//   2 bits: 16v + 4t + i at bits 2t          3 bits: two such vectors, then the high bit of 4t + i
//                                                    at bit t of a third
// Padding has scale 0 (rows) or meets x = 0 (k).
struct QWeight {
  int64_t n, k;           // outputs and inputs
  int bits, kind;         // 2, 3, 4, 8; QWeightKind
  int64_t group;          // k positions that share a scale, a multiple of 16; >= k: one a row
  const uint8_t* codes;   // [blocks][chunks][64 * bits]
  const void* scales;     // [blocks][groups][16]
  int scale_dtype;        // F32, F16, BF16
  const void* zeros;      // as scales: uint8, or scale_dtype for QW_FLOAT_ZERO; null: 2^(bits - 1)
  const float* table;     // [16], QW_TABLE
};

// y[m, n] = x[m, k] W^T + bias + low[m, rank] up[n, rank]^T; the gradient (qmatmul_dx) has x[m, n],
// y[m, k] = x W + low[m, rank] up[rank, k] and no bias. Rows of x and y are contiguous.
struct QMatmulArgs {
  QWeight w;
  int64_t m;
  const void* x;
  int x_dtype;            // F32, F16, BF16
  int64_t x_stride;       // elements from row to row
  void* y;
  int y_dtype;
  int64_t y_stride;
  const float* bias;      // [n] or null
  const float* low;       // rank 0: neither
  const float* up;
  int64_t rank;
  int64_t act_block;      // qmatmul_int8: k positions that share a scale of x; 0: the whole row
  int threads;
  void* scratch;          // scratch(args) bytes, 64-byte aligned
  bool asymmetric = false;             // qmatmul_int8: x in uint8 with a zero point
  const int32_t* code_sums = nullptr;  //   and then what `code_sums` has found
};

struct QMatmulFns {
  void (*run)(const QMatmulArgs&);
  int64_t (*scratch)(const QMatmulArgs&);  // bytes for all threads together
};

struct QMatmulInt8Fns {
  void (*run)(const QMatmulArgs&);
  int64_t (*scratch)(const QMatmulArgs&);
  int64_t (*blocks)(const QWeight&, int64_t act_block);  // of k that are summed in integers
  void (*code_sums)(const QWeight&, int64_t act_block, int32_t* out, int threads);
                                                         // out [blocks of 16 rows][blocks][16]
};

// ---- act_quant: rows of activations to 8 bits (csrc/cpu/act_quant.isa.cpp) -----------------------

struct ActQuantArgs {
  int64_t rows, k;
  const void* x;
  int x_dtype;        // F32, F16, BF16
  int64_t x_stride;   // elements from row to row
  int64_t block;      // values of a row that share a scale, 1 .. k
  bool asymmetric;
  void* codes;        // [rows][k] int8, or uint8 when asymmetric
  float* scales;      // [rows][ceil(k / block)]
  int32_t* sums;      // as scales: sums of codes
  uint8_t* zeros;     // as scales when asymmetric, else null
  int threads;
};

struct ActQuantFns {
  void (*quantize)(const ActQuantArgs&);
};

// ---- qembedding: bags of table rows (csrc/cpu/qembedding.isa.cpp) --------------------------------

constexpr int QE_FLOAT = QW_KIND_COUNT;  // rows of floating values

// out[r] = (add ? out[r] : 0) + sum over e in [starts[b], starts[b + 1]) of coefficients[e] row
// index[e], divided by the number of entries if `mean`; r = rows ? rows[b] : b. Rows lie in the
// layout "rows": codes of k columns side by side, low bits first; 3 bits are a plane of the low two
// and a plane of the high one.
struct QEmbeddingArgs {
  int64_t k;                  // columns
  int bits, kind;             // as in QWeight, or QE_FLOAT
  int64_t group;              // columns that share a scale, a multiple of 16; k: one a row
  const uint8_t* codes;       // [table rows][code_stride]
  int64_t code_stride;        // bytes from row to row
  const void* scales;         // [table rows][groups]
  int value_dtype;            // of scales, or of floating rows: F32, F16, BF16
  const void* zeros;          // as in QWeight, [table rows][groups]
  const float* table;         // [16], QW_TABLE
  int64_t bags;
  const int64_t* index;       // [entries], checked by the caller
  const int64_t* starts;      // [bags + 1], does not fall
  const float* coefficients;  // [entries] or null: 1
  bool mean;
  int64_t padding;            // entries with this index do not count; -1: none
  void* out;                  // [bags or more][out_stride]
  int out_dtype;              // F32, F16, BF16
  int64_t out_stride;         // elements from row to row
  const int64_t* rows;        // [bags], no two alike, or null
  bool add;
  int threads;
};

struct QEmbeddingFns {
  void (*run)(const QEmbeddingArgs&);
};

// ---- weight_quant: weights of 2 to 8 bits, made and undone (csrc/cpu/weight_quant.isa.cpp) ---------

enum WeightLayout : int { WEIGHT_ROWS = 0, WEIGHT_TILE16 = 1, WEIGHT_LAYOUT_COUNT = 2 };

// How scales and codes are found; python/flcore/reference/weight_rules.py has the formulas.
enum WeightRule : int {
  WEIGHT_CENTRED = 0,
  WEIGHT_NARROW = 1,
  WEIGHT_Q8_0 = 2,
  WEIGHT_Q4_0 = 3,
  WEIGHT_MIN_MAX = 4,
  WEIGHT_ABSMAX = 5,
  WEIGHT_FLOOR = 6,
  WEIGHT_CEIL = 7,
  WEIGHT_RCEIL = 8,
  WEIGHT_EVEN = 9,
  WEIGHT_RULE_COUNT = 10
};

enum WeightFlags : int { WEIGHT_NONFINITE = 1, WEIGHT_SCALE_OVERFLOW = 2 };

// Codes, scales and zeros of a weight. WEIGHT_TILE16 is the layout of QWeight; WEIGHT_ROWS has codes
// [n][row bytes], scales and zeros [n][groups].
struct WeightParts {
  int layout;             // WeightLayout
  uint8_t* codes;
  void* scales;
  void* zeros;            // as in QWeight
};

struct WeightQuantArgs {
  int64_t n, k;
  int bits, kind;         // as in QWeight, like the three below
  int64_t group;
  int scale_dtype;
  const float* table;
  WeightParts parts;      // quantize writes, dequantize and repack read them
  void* x;                // [n, k], the weight itself: quantize reads, dequantize writes it
  int x_dtype;            // DType
  WeightParts to;         // repack writes them
  // of quantize
  int rule;               // WeightRule
  bool force_zero, tensor;   // ranges hold 0; one scale for all rows (group >= k)
  float range_floor, largest;  // least mx - mn; largest magnitude of a level
  const float* factors;   // [factor_count] of the range: the one with the least error is taken
  int64_t factor_count;
  const float* limits;    // [16]: limits between the sorted levels, and one more value
  const float* sorted;    // [16] levels in ascending order
  const float* order;     // [16] their codes
  int threads;
  void* scratch;          // scratch(args) bytes, 64-byte aligned
};

struct WeightQuantFns {
  int (*quantize)(const WeightQuantArgs&);  // returns WeightFlags
  void (*dequantize)(const WeightQuantArgs&);
  void (*repack)(const WeightQuantArgs&);
  int64_t (*scratch)(const WeightQuantArgs&);  // bytes for all threads together
};

// ---- one row per instruction-set level (csrc/cpu/dispatch.cpp) ---------------------------------

struct CpuTable {
  const char* name;
  const CombineFns* combine;
  const ProbeFns* probe;
  const SparsifyFns* sparsify;
  const DecodeFns* decode;
  const QuantizeFns* quantize;
  const IndicesFns* indices;
  const RandkFns* randk;
  const Crc32cFns* crc32c;
  const RngFns* rng;
  const MomentsFns* moments;
  const MaskFns* mask;
  const SelectFns* select;
  const GramFns* gram;
  const LowRankFns* low_rank;
  const SketchFns* sketch;
  const VoteFns* vote;
  const LutAddFns* lut_add;
  const RowLossFns* rowloss;
  const PerpGradFns* perp_grad;
  const LocalStepFns* local_step;
  const StableMaxFns* stablemax;
  const QEmbeddingFns* qembedding;
  const QMatmulFns* qmatmul;
  const QMatmulFns* qmatmul_dx;
  const WeightQuantFns* weight_quant;
  const QMatmulInt8Fns* qmatmul_int8;
  const ActQuantFns* act_quant;
};

const CpuTable& cpu();                        // the row chosen for this process
const CpuTable* cpu_level(const char* name);  // null: not in this build or not usable here
int cpu_levels(const char** names, bool* usable, int capacity);  // best first; returns the count

}  // namespace flcore
