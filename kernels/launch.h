// Launchers of the CUDA kernels, for csrc/bindings/cuda.cpp: no CUDA header, no Python.
// Each takes the argument struct of the CPU kernel (threads is ignored), the device and the caller's
// stream (a cudaStream_t as an address; 0 is the legacy default stream). A launcher queues work and
// returns: it allocates nothing, never waits for the device, and may be captured into a CUDA graph.
// A refused launch throws std::runtime_error naming the kernel.
#pragma once

#include <cstdint>
#include <string>

#include "api.h"

namespace flcore {
namespace cuda {

int device_count(std::string* why);  // 0 with the driver's own words when there is none to use

// Client rows one call of launch_combine takes; a longer list goes through a state, group by group.
constexpr int64_t COMBINE_MAX_ROWS = 2000;

// flags: one int32 on the device, zeroed by the caller, into which CombineFlags are or-ed; or null.
// Throws flcore::Error when n > COMBINE_MAX_ROWS.
void launch_combine(const CombineArgs& args, int32_t* flags, int device, uintptr_t stream);

// args.flags: int32 [n] on the device, zeroed by the caller.
void launch_nonfinite(const FiniteArgs& args, int device, uintptr_t stream);

void launch_random(const RngArgs& args, int form, int device, uintptr_t stream);  // RandomForm

// Client rows, and rows of a mixing matrix, that one call of launch_select takes.
constexpr int64_t SELECT_MAX_ROWS = 1024;

// args.mix_*: on the device, or null; mix_values: the coefficients in float32, for layers that are
// not float64. flags: as for launch_combine, of SelectFlags; a NaN in a coordinate makes the result
// NaN whatever args.propagate says. Throws flcore::Error when there are more rows.
void launch_select(const SelectArgs& args, const float* mix_values, int32_t* flags, int device,
                   uintptr_t stream);

// float64 values of the workspace that launch_gram needs for these arguments.
int64_t gram_workspace(const GramArgs& args);

// out: float64 [segments][gram_entries] on the device; sums and scratch of `args` are not used, a
// segment is a run of whole layers. Throws flcore::Error when there are too many rows.
void launch_gram(const GramArgs& args, double* workspace, double* out, int device, uintptr_t stream);

// Rotated codes: addresses in args.feedback (starts, dtype and grads too), args.scales and args.codes
// are on the device; args.scratch is not used. flags: one int32 on the device, zeroed by the caller,
// becomes 1 when t or u is not finite somewhere: what was written is then void. With args.check
// nothing but the flag is written.
void launch_rotate(const QuantizeArgs& args, int32_t* flags, int device, uintptr_t stream);

// args.views: on the device, with addresses of the device in them, of the codecs in
// csrc/packet_image.h. Throws flcore::Error unless there is one packet when it is not added.
void launch_decode(const DecodeArgs& args, bool add, int device, uintptr_t stream);

// ---- qmatmul (kernels/qmatmul.cu): every address is one of the device ----------------------------

// What a product needs beside QMatmulArgs. args.w.codes: in fragment order (kernels/qmatmul.cuh), with
// 4 bits a code for w.bits 2, 3 and 4, 16-byte aligned as scales and zeros are.
struct QMatmulDevice {
  const void* lookup;  // uint32 [256][2] or null: pairs of x's dtype that a byte of codes stands for
  int terms;           // 1 or 2: whether the second ones are needed
  float unit;          // what the scales are multiplied with: 1, or a power of two beside a lookup
  void* workspace;     // qmatmul_workspace() bytes, 256-byte aligned
};

// k cut into blocks of one scale of w (and one of x, for int8).
struct QMatmulBlocks {
  int64_t act, length, count, acts;  // positions of a scale of x, of a block; how many of both
  int of_scale, of_act;              // blocks a scale lasts
};
// Throws flcore::Error when args.act_block neither divides the group nor is a multiple of it.
QMatmulBlocks qmatmul_blocks(const QMatmulArgs& args, bool int8);

// args.w.codes: in the layout tile16. Writes qmatmul_fragment_bytes() bytes: the codes in fragment
// order, every one at a place of its own, and zeros in the places beyond the layout's padding.
int64_t qmatmul_fragment_bytes(const QWeight& w);
void launch_qmatmul_repack(const QWeight& w, uint8_t* fragments, int device, uintptr_t stream);

int64_t qmatmul_workspace(const QMatmulArgs& args, const QMatmulDevice& d, bool int8, int device);
// int8: x is quantised first (float32, float16 or bfloat16). Else x is float16 or bfloat16, and its
// rows begin at multiples of 16 bytes. args.m, w.n and w.k are at least 1; threads, scratch and
// code_sums are not used.
void launch_qmatmul(const QMatmulArgs& args, const QMatmulDevice& d, bool int8, int device,
                    uintptr_t stream);

// ---- sparsify (kernels/sparsify.cu): every address below is one of the device -------------------

constexpr int64_t SPARSE_PART = 8192;

struct SparsePart {  // at most SPARSE_PART coordinates of one layer, one segment, one tile
  int64_t begin, end, segment, layer;
};
struct SparseParts {
  int64_t count;           // at least 1
  const SparsePart* part;  // in order of coordinates
};
struct SparseSelect {  // of a segment: what is known of its k-th largest key
  int64_t need;    // its rank among the keys with the same leading digits
  int64_t above;   // keys with greater ones
  int64_t within;  // keys with the same ones, at the last level that was looked at
  int64_t prefix;  // these digits
};
struct SparseList {
  const int64_t* starts;  // [parts + 1] first entry of each part
  uint16_t* local;        // index in the tile
  float* u;
  float* t;               // null without e
};
struct SparsePlace {  // of the chosen entries of a part
  int64_t at;
  uint32_t above, ties;
};

// counts: [segments][SPARSIFY_BINS], zeroed by the caller. flags[0] becomes 1: not finite.
void launch_sparse_histogram(const FeedbackArgs& args, const SparseParts& parts, int level,
                             const SparseSelect* select, uint32_t* counts, int32_t* flags,
                             int device, uintptr_t stream);
void launch_sparse_recount(const SparseParts& parts, const SparseList& candidates, int level,
                           const SparseSelect* select, uint32_t* counts, int device,
                           uintptr_t stream);
// Moves on to the bin that holds the key looked for, and zeroes the counts.
void launch_sparse_descend(int64_t segments, int level, SparseSelect* select, uint32_t* counts,
                           int device, uintptr_t stream);
// write: e_new <- t, v_new <- s. mask: [parts][SPARSE_PART / 32] bits of keys >= cut[segment], found:
// [parts] how many, zeroed by the caller; or both null.
void launch_sparse_sweep(const FeedbackArgs& args, const SparseParts& parts, const uint32_t* cut,
                         bool write, uint32_t* mask, int32_t* found, int32_t* flags, int device,
                         uintptr_t stream);
void launch_sparse_gather(const FeedbackArgs& args, const SparseParts& parts, const uint32_t* mask,
                          const SparseList& candidates, int device, uintptr_t stream);
// The entries of each segment, whose prefix is the whole key now, to at[segment] and on. first_part:
// [segments + 1]; place: [parts] and tiles: [tiles] entries of each tile, both zeroed by the caller.
void launch_sparse_choose(const SparseParts& parts, int64_t segments, const SparseSelect* select,
                          const SparseList& candidates, const int64_t* first_part,
                          const int64_t* at, SparsePlace* place, uint32_t* tiles,
                          const SparseList& chosen, int device, uintptr_t stream);
// Values (and scales) of the entries as they are sent; the new state is corrected there. Indices are
// not written.
void launch_sparse_emit(const FeedbackArgs& args, const EmitArgs& out, int device,
                        uintptr_t stream);

}  // namespace cuda
}  // namespace flcore
