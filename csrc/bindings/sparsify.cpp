// sparsify of flcore._core: sizes that C++ can check are checked here and in csrc/sparsify.cpp, what
// an address points to was checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/feedback_call.h"
#include "bindings/sparse_call.h"
#include "check.h"
#include "sparsify.h"

namespace py = pybind11;

namespace flcore {

static int64_t sparsify_packet(const Addresses& layers, const std::vector<int64_t>& numel,
                               const std::vector<int>& dtype, const py::dict& state,
                               int64_t segments, uintptr_t starts, uintptr_t k, uint32_t floor,
                               int64_t rank, float slack, uintptr_t tau, const py::dict& packet,
                               int threads) {
  const SparsePacket out = sparse_packet(packet);
  const FeedbackCall call(layers, numel, dtype, state, out.header.seed, out.header.round, threads);
  const Selection selection{segments,
                            reinterpret_cast<const int64_t*>(starts),
                            reinterpret_cast<const int64_t*>(k),
                            floor,
                            rank,
                            slack,
                            reinterpret_cast<uint32_t*>(tau)};
  py::gil_scoped_release nogil;
  return sparsify(call.args, selection, out);
}

// Key of entry `rank` of a sample.
static uint32_t sample_key(const Addresses& layers, const std::vector<int64_t>& numel,
                           const std::vector<int>& dtype, const py::dict& state, int64_t step,
                           int64_t phase, int64_t rank, int threads) {
  const FeedbackCall call(layers, numel, dtype, state, 0, 0, threads);
  FLCORE_CHECK(step >= 1 && phase >= 0 && phase < step, "phase: expected 0 to ", step - 1, ", got ",
               phase);
  const int64_t samples = sparse_samples(call.args.numel, step, phase);
  FLCORE_CHECK(rank >= 1 && rank <= samples, "rank: expected 1 to ", samples, ", got ", rank);
  py::gil_scoped_release nogil;
  std::vector<uint32_t> keys(static_cast<size_t>(samples));
  cpu().sparsify->sample(call.args, 0, call.args.numel, step, phase, keys.data());
  return cpu().sparsify->ranked(keys.data(), samples, rank);
}

// Entries that were encoded elsewhere, in memory of the CPU.
static int64_t sparse_pack_packet(int64_t numel, uintptr_t starts, uintptr_t local,
                                  uintptr_t values, uintptr_t scales, const py::dict& packet,
                                  int threads) {
  const SparsePacket out = sparse_packet(packet);
  FLCORE_CHECK(out.choice != INDEX_GIVEN || out.header.index != wire::SEEDED,
               "index: expected indices to write");
  const SparseSections sections{numel,
                                reinterpret_cast<const int64_t*>(starts),
                                reinterpret_cast<const uint16_t*>(local),
                                reinterpret_cast<const uint8_t*>(values),
                                reinterpret_cast<const uint8_t*>(scales),
                                threads};
  py::gil_scoped_release nogil;
  return sparse_pack(sections, out);
}

void bind_sparsify(py::module_& m) {
  m.def("sparse_pack", &sparse_pack_packet, py::arg("numel"), py::arg("starts"), py::arg("local"),
        py::arg("values"), py::arg("scales"), py::arg("packet"), py::arg("threads"),
        "A sparse packet of values that are encoded already (csrc/sparse_emit.cpp); bytes.");
  m.def("sparsify", &sparsify_packet, py::arg("layers"), py::arg("numel"), py::arg("dtype"),
        py::arg("state"), py::arg("segments"), py::arg("starts"), py::arg("k"), py::arg("floor"),
        py::arg("rank"), py::arg("slack"), py::arg("tau"), py::arg("packet"), py::arg("threads"),
        "Feedback, exact top-k, packet, state update (csrc/sparsify.cpp); bytes, or -1: not finite.");
  m.def("sample_key", &sample_key, py::arg("layers"), py::arg("numel"), py::arg("dtype"),
        py::arg("state"), py::arg("step"), py::arg("phase"), py::arg("rank"), py::arg("threads"),
        "Key of the rank-th largest of a sample of u: SPARSE_RUN coordinates of every step runs.");
}

}  // namespace flcore
