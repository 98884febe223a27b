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

}  // namespace cuda
}  // namespace flcore
