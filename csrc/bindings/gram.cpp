// Squared norms, distances and products of flcore._core.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/packet_call.h"
#include "exact.h"

namespace py = pybind11;

namespace flcore {

using Sums = py::array_t<int64_t, py::array::c_style>;  // (segments, entries, words)

static void check_starts(const char* name, const std::vector<int64_t>& starts) {
  FLCORE_CHECK(!starts.empty() && starts.front() == 0, name, ": expected to begin with 0");
  for (size_t i = 1; i < starts.size(); ++i)
    FLCORE_CHECK(starts[i] >= starts[i - 1], name, ": must not fall");
}

static void gram(const Addresses& rows, int64_t n, const std::vector<int64_t>& starts,
                 const std::vector<int>& dtype, int kind, bool wide,
                 const std::vector<int64_t>& segment_starts, Sums sums, int threads,
                 const Packets& packets) {
  check_starts("starts", starts);
  check_starts("segment_starts", segment_starts);
  std::vector<int64_t> numel;
  for (size_t l = 1; l < starts.size(); ++l) numel.push_back(starts[l] - starts[l - 1]);
  const PacketTable table = packet_table(packets, rows, numel, dtype);
  FLCORE_CHECK(packets.empty() || table.count() == n, "packets: expected ", n, ", got ",
               table.count());
  check_table(rows, packets.empty() ? n : 0, numel, dtype);
  FLCORE_CHECK(n >= 1, "rows: expected at least one");
  FLCORE_CHECK(kind >= 0 && kind < GRAM_KIND_COUNT, "kind: unknown code ", kind);
  FLCORE_CHECK(segment_starts.back() == starts.back(), "segment_starts: expected to end at ",
               starts.back());
  const int64_t segments = int64_t(segment_starts.size()) - 1;
  FLCORE_CHECK(sums.ndim() == 3 && sums.shape(0) == segments &&
                   sums.shape(1) == gram_entries(n, kind) && sums.shape(2) == gram_words(wide),
               "sums: expected shape (", segments, ", ", gram_entries(n, kind), ", ",
               gram_words(wide), ")");
  threads = threads < 1 ? 1 : threads;
  const auto x = pointers<const void>(rows);
  std::vector<int64_t> first_chunk(segment_starts.size());
  GramArgs args{n,
                int64_t(dtype.size()),
                starts.data(),
                dtype.data(),
                x.data(),
                kind,
                wide,
                segments,
                segment_starts.data(),
                sums.mutable_data(),
                threads,
                first_chunk.data(),
                nullptr,
                table.data()};
  const Scratch scratch(threads * cpu().gram->scratch(args));
  args.scratch = scratch.data();
  py::gil_scoped_release nogil;
  cpu().gram->gram(args);
}

static py::array_t<double> gram_finish(const Sums& sums, bool wide, bool is_signed) {
  FLCORE_CHECK(sums.ndim() == 3 && sums.shape(2) == gram_words(wide), "sums: expected (.., ",
               gram_words(wide), ") words");
  py::array_t<double> values({sums.shape(0), sums.shape(1)});
  const ExactForm form = gram_form(wide);
  const int64_t* from = sums.data();
  double* to = values.mutable_data();
  for (py::ssize_t i = 0; i < values.size(); ++i)
    to[i] = exact_value(from + i * form.words(), form, is_signed);
  return values;
}

void bind_gram(py::module_& m) {
  m.attr("GRAM_TILE") = GRAM_TILE;
  m.def(
      "gram_shape",
      [](int64_t n, int kind, bool wide) {
        return py::make_tuple(gram_entries(n, kind), gram_words(wide));
      },
      py::arg("n"), py::arg("kind"), py::arg("wide"),
      "Entries and words of the sums of a segment.");
  m.def("gram", &gram, py::arg("rows"), py::arg("n"), py::arg("starts"), py::arg("dtype"),
        py::arg("kind"), py::arg("wide"), py::arg("segment_starts"), py::arg("sums").noconvert(),
        py::arg("threads"), py::arg("packets") = Packets(),
        "Adds exact sums over all coordinates (csrc/cpu/gram.isa.cpp).");
  m.def("gram_finish", &gram_finish, py::arg("sums"), py::arg("wide"), py::arg("is_signed"),
        "Exact sums rounded to float64.");
}

}  // namespace flcore
