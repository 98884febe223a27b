// Order statistics of flcore._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/packet_call.h"

namespace py = pybind11;

namespace flcore {

static int select(const Addresses& rows, int64_t n, const std::vector<int64_t>& numel,
                  const std::vector<int>& dtype, int op, int median, int64_t f, int64_t keep,
                  bool mixed, const std::vector<int64_t>& mix_starts,
                  const std::vector<int64_t>& mix_rows, const std::vector<double>& mix_values,
                  bool propagate, const Addresses& out, int threads, const Packets& packets) {
  const PacketTable table = packet_table(packets, rows, numel, dtype);
  FLCORE_CHECK(packets.empty() || table.count() == n, "packets: expected ", n, ", got ",
               table.count());
  check_table(rows, packets.empty() ? n : 0, numel, dtype);
  FLCORE_CHECK(n >= 1, "rows: expected at least one");
  FLCORE_CHECK(out.size() == numel.size(), "out: one address a layer");
  FLCORE_CHECK(op >= 0 && op < SELECT_OP_COUNT, "op: unknown code ", op);
  FLCORE_CHECK(median >= MEDIAN_AVERAGE && median <= MEDIAN_UPPER, "median: unknown code ", median);
  FLCORE_CHECK(!mix_starts.empty() && mix_starts.front() == 0 &&
                   mix_starts.back() == int64_t(mix_rows.size()) &&
                   mix_rows.size() == mix_values.size(),
               "mix: sizes differ");
  for (size_t i = 1; i < mix_starts.size(); ++i)
    FLCORE_CHECK(mix_starts[i] >= mix_starts[i - 1], "mix: starts must not fall");
  for (int64_t r : mix_rows) FLCORE_CHECK(r >= 0 && r < n, "mix: no row ", r);
  const int64_t count = mixed ? int64_t(mix_starts.size()) - 1 : n;
  FLCORE_CHECK(count >= 1 && f >= 0 && (op == SELECT_MEDIAN || 2 * f < count), "f: got ", f);
  FLCORE_CHECK(op < SELECT_NEAR_MEDIAN || (keep >= 1 && keep <= count), "keep: got ", keep);
  threads = threads < 1 ? 1 : threads;
  const auto x = pointers<const void>(rows);
  const auto to = pointers<>(out);
  std::vector<int64_t> first_tile(numel.size() + 1);
  SelectArgs args{n,
                  int64_t(numel.size()),
                  numel.data(),
                  dtype.data(),
                  x.data(),
                  op,
                  median,
                  f,
                  keep,
                  count,
                  mixed ? mix_starts.data() : nullptr,
                  mix_rows.data(),
                  mix_values.data(),
                  propagate,
                  to.data(),
                  threads,
                  first_tile.data(),
                  nullptr,
                  table.data(),
                  table.starts.data()};
  const Scratch scratch(threads * cpu().select->scratch(args));
  args.scratch = scratch.data();
  py::gil_scoped_release nogil;
  return cpu().select->select(args);
}

void bind_select(py::module_& m) {
  m.attr("SELECT_NONFINITE") = int(SELECT_NONFINITE);
  m.def("select", &select, py::arg("rows"), py::arg("n"), py::arg("numel"), py::arg("dtype"),
        py::arg("op"), py::arg("median"), py::arg("f"), py::arg("keep"), py::arg("mixed"),
        py::arg("mix_starts"), py::arg("mix_rows"), py::arg("mix_values"), py::arg("propagate"),
        py::arg("out"), py::arg("threads"), py::arg("packets") = Packets(),
        "Order statistic of every coordinate (csrc/cpu/select.isa.cpp); returns SelectFlags.");
}

}  // namespace flcore
