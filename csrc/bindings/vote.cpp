// Majority votes of flcore._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"
#include "wire.h"

namespace py = pybind11;

namespace flcore {

static void vote(const std::vector<const wire::Packet*>& packets,
                 const std::vector<double>& weights, int form, uintptr_t out, int64_t numel,
                 int threads) {
  FLCORE_CHECK(!packets.empty(), "packets: expected at least one");
  FLCORE_CHECK(weights.empty() || weights.size() == packets.size(), "weights: expected ",
               packets.size(), " or none, got ", weights.size());
  FLCORE_CHECK(form >= 0 && form < VOTE_FORM_COUNT, "form: unknown code ", form);
  std::vector<VoteRow> rows;
  for (size_t i = 0; i < packets.size(); ++i) {
    const PacketView p = packets[i]->view(weights.empty() ? 1.0 : weights[i]);
    FLCORE_CHECK(p.codec == CODEC_SIGN, "packets[", i, "]: expected signs");
    FLCORE_CHECK(p.numel == numel, "packets[", i, "]: holds ", p.numel, " coordinates, out ",
                 numel);
    rows.push_back({p.codes, p.bucket, p.weight});
  }
  threads = threads < 1 ? 1 : threads;
  const int64_t n = int64_t(rows.size());
  const Scratch scratch(threads * cpu().vote->scratch(n));
  const VoteArgs args{
      n,       numel,         rows.data(), !weights.empty(), form, reinterpret_cast<void*>(out),
      threads, scratch.data()};
  py::gil_scoped_release nogil;
  cpu().vote->vote(args);
}

void bind_vote(py::module_& m) {
  m.def("vote", &vote, py::arg("packets"), py::arg("weights"), py::arg("form"), py::arg("out"),
        py::arg("numel"), py::arg("threads"),
        "Majority or weighted sum of packed signs (csrc/cpu/vote.isa.cpp).");
}

}  // namespace flcore
