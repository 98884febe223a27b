// Aggregation ops of flcore._core: weighted sums and server steps.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/combine_call.h"
#include "bindings/packet_call.h"
#include "bindings/random_args.h"

namespace py = pybind11;

namespace flcore {

using Sizes = std::vector<int64_t>;
using Codes = std::vector<int>;
using Numbers = std::vector<double>;

static int combine(const Addresses& rows, const Numbers& weights, const Sizes& numel,
                   const Codes& dtype, const Addresses& state, const Addresses& out,
                   int accumulate, double divisor, int threads, bool check) {
  const CombineCall call(rows, weights, numel, dtype, state, out, accumulate, divisor, threads,
                         check);
  py::gil_scoped_release nogil;
  return cpu().combine->combine(call.args);
}

static int combine_scaled(const Addresses& rows, int64_t n, const Numbers& weights,
                          const Sizes& numel, const Codes& dtype, const Codes& out_dtype,
                          const Addresses& out, int accumulate, double divisor, int threads,
                          bool check) {
  FLCORE_CHECK(out.size() == numel.size(), "out: one address a layer is needed");
  const CombineCall call(n, rows, weights, true, numel, dtype, out_dtype, {}, out, accumulate,
                         divisor, threads, check);
  py::gil_scoped_release nogil;
  return cpu().combine->combine(call.args);
}

// Sums of packets in cache.
static Scratch packet_scratch(const CombineArgs& args) {
  return Scratch(args.packets ? args.threads * cpu().combine->scratch(args) : 0);
}

// `weights`: one for each packet, or for each layer of each.
static int combine_packets(const Packets& packets, const Numbers& weights, bool by_layer,
                           const Sizes& numel, const Codes& out_dtype, const Addresses& out,
                           int accumulate, double divisor, int threads, bool check) {
  FLCORE_CHECK(out.size() == numel.size(), "out: one address a layer is needed");
  const Codes dtype(numel.size(), F32);
  const PacketTable table = packet_table(packets, {}, numel, dtype, weights);
  CombineCall call(table.count(), {}, weights, by_layer, numel, dtype, out_dtype, {}, out,
                   accumulate, divisor, threads < 1 ? 1 : threads, check, table);
  const Scratch scratch = packet_scratch(call.args);
  call.args.scratch = scratch.data();
  py::gil_scoped_release nogil;
  return cpu().combine->combine(call.args);
}

static int combine_rows(const Addresses& rows, int64_t n, const Sizes& starts, const Sizes& index,
                        const Numbers& coefficients, const Sizes& numel, const Codes& dtype,
                        const Addresses& out, int accumulate, int threads, bool check) {
  const CombineCall call(n, rows, Numbers(size_t(n), 0.0), false, numel, dtype, {}, {}, {},
                         accumulate, 1.0, threads, check);
  const size_t entries = coefficients.size();
  FLCORE_CHECK(!starts.empty() && starts.front() == 0 && starts.back() == int64_t(entries) &&
                   index.size() == entries,
               "matrix: starts, index and coefficients do not fit together");
  for (size_t k = 1; k < starts.size(); ++k)
    FLCORE_CHECK(starts[k - 1] <= starts[k], "matrix: starts decrease at line ", k - 1);
  for (int64_t i : index) FLCORE_CHECK(i >= 0 && i < n, "matrix: there is no row ", i);
  const int64_t m = int64_t(starts.size()) - 1;
  FLCORE_CHECK(out.size() == size_t(m) * numel.size(), "out: expected ", m, " x ", numel.size(),
               " addresses, got ", out.size());
  const std::vector<void*> targets = pointers<>(out);
  const CombineRowsArgs args{call.args,    m,
                             starts.data(), index.data(),
                             coefficients.data(), targets.data()};
  py::gil_scoped_release nogil;
  return cpu().combine->rows(args);
}

// `buffers`: model, m, v, new_model, new_m, new_v, copy; m and v may be empty, and so may copy.
static int combine_step(const Addresses& rows, int64_t n, const Numbers& weights, bool by_layer,
                        const Sizes& numel, const Codes& dtype, const Codes& model_dtype,
                        const std::vector<Addresses>& buffers, int kind, const Numbers& scalars,
                        bool models, int copy_dtype, double noise_std, uint64_t seed,
                        uint32_t round, uint32_t client, const std::vector<uint32_t>& tensor,
                        int accumulate, double divisor, int threads, bool check,
                        const Packets& packets, const std::vector<Addresses>& sums) {
  const size_t layers = numel.size();
  FLCORE_CHECK(model_dtype.size() == layers, "model_dtype: expected ", layers, " codes, got ",
               model_dtype.size());
  Codes sum_dtype(layers);
  for (size_t l = 0; l < layers; ++l) {
    FLCORE_CHECK(model_dtype[l] >= 0 && model_dtype[l] < DTYPE_COUNT, "model_dtype: unknown code ",
                 model_dtype[l]);
    sum_dtype[l] = model_dtype[l] == F64 ? F64 : F32;
  }
  const PacketTable table = packet_table(packets, rows, numel, dtype, weights);
  FLCORE_CHECK(packets.empty() || !models, "models: packets are updates");
  const bool control = !sums.empty();
  FLCORE_CHECK(!control || (sums.size() == 2 && sums[1].size() == layers && !packets.empty() &&
                            accumulate != ACC_REPRODUCIBLE),
               "sums: expected old and new ones of packets");
  CombineCall call(n, rows, weights, by_layer, numel, dtype, sum_dtype,
                   control ? sums[0] : Addresses(), {}, accumulate, divisor,
                   threads < 1 ? 1 : threads, check, table);
  const Scratch scratch = packet_scratch(call.args);
  call.args.scratch = scratch.data();
  const std::vector<void*> new_sums = pointers<>(control ? sums[1] : Addresses());
  FLCORE_CHECK(kind >= 0 && kind < STEP_KIND_COUNT, "kind: unknown code ", kind);
  FLCORE_CHECK(scalars.size() == 4, "scalars: expected lr, beta1, beta2, tau");
  FLCORE_CHECK(buffers.size() == 7, "buffers: expected 7 lists, got ", buffers.size());
  const bool has_m = kind != STEP_SGD, has_copy = !buffers[6].empty();
  const bool has_v = has_m && kind != STEP_MOMENTUM && kind != STEP_LINEAR;
  const bool needed[7] = {true, has_m, has_v, true, has_m, has_v, has_copy};
  std::vector<std::vector<void*>> p;
  for (size_t b = 0; b < 7; ++b) {
    FLCORE_CHECK(!needed[b] || buffers[b].size() == layers, "buffers[", b, "]: expected ", layers,
                 " addresses, got ", buffers[b].size());
    p.push_back(needed[b] ? pointers<>(buffers[b]) : std::vector<void*>());
  }
  FLCORE_CHECK(!has_copy || copy_dtype == F16 || copy_dtype == BF16,
               "copy_dtype: expected float16 or bfloat16, got code ", copy_dtype);
  FLCORE_CHECK(noise_std == 0 || tensor.size() == layers, "tensor: expected ", layers,
               " stream names, got ", tensor.size());
  if (noise_std != 0)
    for (int64_t count : numel) random_args(0, count, seed, round, 0, client, 0, 1);  // its limits
  const StepArgs args{call.args,
                      kind,
                      models,
                      scalars[0],
                      scalars[1],
                      scalars[2],
                      scalars[3],
                      model_dtype.data(),
                      p[0].data(),
                      p[1].data(),
                      p[2].data(),
                      p[3].data(),
                      p[4].data(),
                      p[5].data(),
                      has_copy ? p[6].data() : nullptr,
                      copy_dtype,
                      noise_std,
                      philox_stream(seed, round, 0, client),
                      tensor.data(),
                      data_or_null(new_sums)};
  py::gil_scoped_release nogil;
  return cpu().combine->step(args);
}

static std::vector<int32_t> nonfinite(const Addresses& rows, int64_t n, const Sizes& numel,
                                      const Codes& dtype, int threads) {
  check_table(rows, n, numel, dtype, ROW_DTYPE_COUNT);
  const auto x = pointers<const void>(rows);
  std::vector<int32_t> flags(size_t(n), 0);
  std::vector<int64_t> first_tile(numel.size() + 1);
  const FiniteArgs args{n,        int64_t(numel.size()), numel.data(), dtype.data(),
                        x.data(), flags.data(),          threads,      first_tile.data()};
  py::gil_scoped_release nogil;
  cpu().combine->nonfinite(args);
  return flags;
}

void bind_aggregation(py::module_& m) {
  m.attr("COMBINE_NONFINITE") = int(COMBINE_NONFINITE);
  m.attr("COMBINE_OUT_OF_RANGE") = int(COMBINE_OUT_OF_RANGE);
  m.attr("STEP_NONFINITE") = int(STEP_NONFINITE);
  m.attr("ROW_DTYPES") = py::make_tuple("float64", "float32", "float16", "bfloat16", "int8");
  m.attr("STEP_KINDS") = py::make_tuple("sgd", "momentum", "adagrad", "adam", "yogi",
                                       "linear");
  m.def("combine", &combine, py::arg("rows"), py::arg("weights"), py::arg("numel"),
        py::arg("dtype"), py::arg("state"), py::arg("out"), py::arg("accumulate"),
        py::arg("divisor"), py::arg("threads"), py::arg("check") = true,
        "Weighted sum of client rows (csrc/cpu/combine.isa.cpp); returns CombineFlags.");
  m.def("combine_scaled", &combine_scaled, py::arg("rows"), py::arg("n"), py::arg("weights"),
        py::arg("numel"), py::arg("dtype"), py::arg("out_dtype"), py::arg("out"),
        py::arg("accumulate"), py::arg("divisor"), py::arg("threads"), py::arg("check"),
        "Weighted sum with a weight for each layer of each row, int8 rows included.");
  m.def("combine_rows", &combine_rows, py::arg("rows"), py::arg("n"), py::arg("starts"),
        py::arg("index"), py::arg("coefficients"), py::arg("numel"), py::arg("dtype"),
        py::arg("out"), py::arg("accumulate"), py::arg("threads"), py::arg("check"),
        "Sums of the same rows, one for each line of a sparse matrix; returns CombineFlags.");
  m.def("combine_step", &combine_step, py::arg("rows"), py::arg("n"), py::arg("weights"),
        py::arg("by_layer"), py::arg("numel"), py::arg("dtype"), py::arg("model_dtype"),
        py::arg("buffers"), py::arg("kind"), py::arg("scalars"), py::arg("models"),
        py::arg("copy_dtype"), py::arg("noise_std"), py::arg("seed"), py::arg("round"),
        py::arg("client"), py::arg("tensor"), py::arg("accumulate"), py::arg("divisor"),
        py::arg("threads"), py::arg("check"), py::arg("packets") = Packets(),
        py::arg("sums") = std::vector<Addresses>(),
        "A weighted sum and one step of a server optimiser along it; returns CombineFlags.");
  m.def("combine_packets", &combine_packets, py::arg("packets"), py::arg("weights"),
        py::arg("by_layer"), py::arg("numel"), py::arg("out_dtype"), py::arg("out"), py::arg("accumulate"),
        py::arg("divisor"), py::arg("threads"), py::arg("check"),
        "Weighted sum of packets with a weight for each layer of each; returns CombineFlags.");
  m.def("nonfinite", &nonfinite, py::arg("rows"), py::arg("n"), py::arg("numel"), py::arg("dtype"),
        py::arg("threads"), "1 for each row that holds a NaN or an infinity, else 0.");
}

}  // namespace flcore
