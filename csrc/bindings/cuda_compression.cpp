// Packets in flcore._cuda: decoding lists of them, and the passes of top-k. Every address is one of the
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/cuda_bindings.h"
#include "bindings/feedback_call.h"
#include "check.h"
#include "launch.h"

namespace py = pybind11;

namespace flcore {

// views: address on the device of an image that PacketImage wrote for it.
static void decode(uintptr_t views, int64_t packets, const Addresses& out,
                   const std::vector<int64_t>& numel, const std::vector<int>& dtype, bool add,
                   int device, uintptr_t stream) {
  FLCORE_CHECK(packets >= 0, "packets: got ", packets);
  const auto starts = layer_starts(numel, out, dtype);
  for (int d : dtype)
    FLCORE_CHECK(d == F64 || d == F32, "out: expected float64 or float32, got code ", d);
  const auto targets = pointers<>(out);
  const DecodeArgs args{starts.back(),
                        packets,
                        reinterpret_cast<const PacketView*>(views),
                        int64_t(numel.size()),
                        starts.data(),
                        dtype.data(),
                        targets.data(),
                        1};
  py::gil_scoped_release nogil;
  cuda::launch_decode(args, add, device, stream);
}

using Triple = std::array<uintptr_t, 3>;

// The passes of kernels/sparsify.cu over one update. layers: addresses of starts int64 [layers + 1],
// dtype int32 [layers] and addresses of the layers int64 [layers].
class SparsifyPasses {
 public:
  SparsifyPasses(int64_t numel, int64_t layers, const Triple& table, const py::dict& state,
                 uint64_t seed, uint64_t round, uintptr_t parts, int64_t count, int64_t segments,
                 int device, uintptr_t stream)
      : args_(FeedbackCall({}, {}, {}, state, seed, round, 1).args),
        parts_{count, reinterpret_cast<const cuda::SparsePart*>(parts)},
        segments_(segments),
        device_(device),
        stream_(stream) {
    FLCORE_CHECK(numel >= 1 && layers >= 1 && count >= 1 && segments >= 1,
                 "update: expected at least one coordinate");
    FLCORE_CHECK(numel < int64_t(1) << 32, "update: expected less than 2^32 coordinates, got ",
                 numel);
    args_.numel = numel;
    args_.layers = layers;
    args_.starts = reinterpret_cast<const int64_t*>(table[0]);
    args_.dtype = reinterpret_cast<const int*>(table[1]);
    args_.grads = reinterpret_cast<const void* const*>(table[2]);
  }

  void histogram(int level, uintptr_t select, uintptr_t counts, uintptr_t flags) const {
    check_level(level);
    cuda::launch_sparse_histogram(args_, parts_, level, at<cuda::SparseSelect>(select),
                                  at<uint32_t>(counts), at<int32_t>(flags), device_, stream_);
    descend(level, select, counts);
  }
  void recount(int level, const Addresses& candidates, uintptr_t select, uintptr_t counts) const {
    check_level(level);
    cuda::launch_sparse_recount(parts_, list(candidates), level, at<cuda::SparseSelect>(select),
                                at<uint32_t>(counts), device_, stream_);
    descend(level, select, counts);
  }
  void sweep(uintptr_t cut, bool write, uintptr_t mask, uintptr_t found, uintptr_t flags) const {
    cuda::launch_sparse_sweep(args_, parts_, at<uint32_t>(cut), write, at<uint32_t>(mask),
                              at<int32_t>(found), at<int32_t>(flags), device_, stream_);
  }
  void gather(uintptr_t mask, const Addresses& candidates) const {
    cuda::launch_sparse_gather(args_, parts_, at<uint32_t>(mask), list(candidates), device_,
                               stream_);
  }
  void choose(uintptr_t select, const Addresses& candidates, uintptr_t first_part,
              uintptr_t first_entry, uintptr_t place, uintptr_t tiles,
              const Addresses& chosen) const {
    cuda::launch_sparse_choose(parts_, segments_, at<cuda::SparseSelect>(select), list(candidates),
                               at<int64_t>(first_part), at<int64_t>(first_entry),
                               at<cuda::SparsePlace>(place), at<uint32_t>(tiles), list(chosen),
                               device_, stream_);
  }
  void emit(const Addresses& chosen, int value_dtype, uintptr_t scales, uintptr_t values) const {
    FLCORE_CHECK(value_dtype >= F32 && value_dtype <= WIRE_INT8, "value_dtype: unknown code ",
                 value_dtype);
    const cuda::SparseList entries = list(chosen);
    EmitArgs out = {};
    out.entries = {entries.starts, entries.local, entries.u, entries.t};
    out.value_dtype = value_dtype;
    out.scales = at<uint8_t>(scales);
    out.values = at<uint8_t>(values);
    cuda::launch_sparse_emit(args_, out, device_, stream_);
  }

 private:
  template <class T>
  static T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
  }
  static void check_level(int level) {
    FLCORE_CHECK(level >= 0 && level < SPARSIFY_LEVELS, "level: got ", level);
  }
  cuda::SparseList list(const Addresses& x) const {
    FLCORE_CHECK(x.size() == 4, "entries: expected starts, local, u, t");
    FLCORE_CHECK(!args_.e || x[3], "entries: expected t beside e");
    return {at<int64_t>(x[0]), at<uint16_t>(x[1]), at<float>(x[2]), at<float>(x[3])};
  }
  void descend(int level, uintptr_t select, uintptr_t counts) const {
    cuda::launch_sparse_descend(segments_, level, at<cuda::SparseSelect>(select),
                                at<uint32_t>(counts), device_, stream_);
  }

  FeedbackArgs args_;
  cuda::SparseParts parts_;
  int64_t segments_;
  int device_;
  uintptr_t stream_;
};

void bind_cuda_compression(py::module_& m) {
  m.attr("SPARSE_PART") = cuda::SPARSE_PART;
  py::class_<SparsifyPasses>(m, "SparsifyPasses", py::module_local(),
                             "Passes of top-k (kernels/sparsify.cu).")
      .def(py::init<int64_t, int64_t, const Triple&, const py::dict&, uint64_t, uint64_t, uintptr_t,
                    int64_t, int64_t, int, uintptr_t>(),
           py::kw_only(), py::arg("numel"), py::arg("layers"), py::arg("table"), py::arg("state"),
           py::arg("seed"), py::arg("round"), py::arg("parts"), py::arg("count"),
           py::arg("segments"), py::arg("device"), py::arg("stream"))
      .def("histogram", &SparsifyPasses::histogram, py::arg("level"), py::arg("select"),
           py::arg("counts"), py::arg("flags"), "Next digit of the k-th keys, of all coordinates.")
      .def("recount", &SparsifyPasses::recount, py::arg("level"), py::arg("candidates"),
           py::arg("select"), py::arg("counts"), "Next digit of the k-th keys, of candidates.")
      .def("sweep", &SparsifyPasses::sweep, py::arg("cut"), py::arg("write"), py::arg("mask"),
           py::arg("found"), py::arg("flags"), "New state, or which keys reach the cut, or both.")
      .def("gather", &SparsifyPasses::gather, py::arg("mask"), py::arg("candidates"),
           "Candidates into lists; the old state must still be there.")
      .def("choose", &SparsifyPasses::choose, py::arg("select"), py::arg("candidates"),
           py::arg("first_part"), py::arg("first_entry"), py::arg("place"), py::arg("tiles"),
           py::arg("chosen"), "The k entries of each segment, in order.")
      .def("emit", &SparsifyPasses::emit, py::arg("chosen"), py::arg("value_dtype"),
           py::arg("scales"), py::arg("values"), "Values on the wire, corrections of the state.");
  m.def("decode", &decode, py::arg("views"), py::arg("packets"), py::arg("out"), py::arg("numel"),
        py::arg("dtype"), py::arg("add"), py::arg("device"), py::arg("stream"),
        "Packets into accumulators (kernels/decode.cu); views: a PacketImage on the device.");
}

}  // namespace flcore
