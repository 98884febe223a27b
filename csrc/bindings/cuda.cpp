// flcore._cuda: the launchers of kernels/launch.h. Built only where nvcc is; loads without a driver.
// Every call names the device and the caller's stream, queues its kernels and returns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "api.h"
#include "bindings/combine_call.h"
#include "bindings/cuda_bindings.h"
#include "bindings/feedback_call.h"
#include "bindings/random_args.h"
#include "launch.h"
#include "rotation.h"

namespace py = pybind11;

namespace flcore {

static py::tuple device_count() {
  std::string why;
  const int count = cuda::device_count(&why);
  return py::make_tuple(count, why);
}

static void combine(const Addresses& rows, const std::vector<double>& weights,
                    const std::vector<int64_t>& numel, const std::vector<int>& dtype,
                    const Addresses& state, const Addresses& out, int accumulate, double divisor,
                    uintptr_t flags, int device, uintptr_t stream) {
  const CombineCall call(rows, weights, numel, dtype, state, out, accumulate, divisor, 1);
  py::gil_scoped_release nogil;
  cuda::launch_combine(call.args, reinterpret_cast<int32_t*>(flags), device, stream);
}

static void nonfinite(const Addresses& rows, int64_t n, const std::vector<int64_t>& numel,
                      const std::vector<int>& dtype, uintptr_t flags, int device,
                      uintptr_t stream) {
  check_table(rows, n, numel, dtype);
  const auto x = pointers<const void>(rows);
  const FiniteArgs args{n,        int64_t(numel.size()),             numel.data(), dtype.data(),
                        x.data(), reinterpret_cast<int32_t*>(flags), 1,            nullptr};
  py::gil_scoped_release nogil;
  cuda::launch_nonfinite(args, device, stream);
}

static void fill_random(uintptr_t out, int64_t numel, int form, uint64_t seed, uint32_t round,
                        uint32_t tensor, uint32_t client, int64_t offset, int device,
                        uintptr_t stream) {
  FLCORE_CHECK(form >= 0 && form < RANDOM_FORM_COUNT, "form: unknown code ", form);
  const RngArgs args = random_args(out, numel, seed, round, tensor, client, offset, 1);
  py::gil_scoped_release nogil;
  cuda::launch_random(args, form, device, stream);
}

// The mixing matrix lies on the device: addresses of mix_starts int64 [count + 1], mix_rows int64,
// mix_values float64 and the same in float32, all 0 for none.
static void select(const Addresses& rows, int64_t n, const std::vector<int64_t>& numel,
                   const std::vector<int>& dtype, int op, int median, int64_t f, int64_t keep,
                   int64_t count, const std::array<uintptr_t, 4>& mix, const Addresses& out,
                   uintptr_t flags, int device, uintptr_t stream) {
  check_table(rows, n, numel, dtype);
  FLCORE_CHECK(n >= 1 && count >= 1, "rows: expected at least one");
  FLCORE_CHECK(out.size() == numel.size(), "out: one address a layer");
  FLCORE_CHECK(op >= 0 && op < SELECT_OP_COUNT, "op: unknown code ", op);
  FLCORE_CHECK(median >= MEDIAN_AVERAGE && median <= MEDIAN_UPPER, "median: unknown code ", median);
  FLCORE_CHECK(f >= 0 && (op == SELECT_MEDIAN || 2 * f < count), "f: got ", f);
  FLCORE_CHECK(op < SELECT_NEAR_MEDIAN || (keep >= 1 && keep <= count), "keep: got ", keep);
  FLCORE_CHECK(mix[0] || count == n, "count: expected ", n, " without mixing, got ", count);
  const auto x = pointers<const void>(rows);
  const auto to = pointers<>(out);
  SelectArgs args = {};
  args.n = n;
  args.layers = int64_t(numel.size());
  args.numel = numel.data();
  args.dtype = dtype.data();
  args.rows = x.data();
  args.op = op;
  args.median = median;
  args.f = f;
  args.keep = keep;
  args.count = count;
  args.mix_starts = reinterpret_cast<const int64_t*>(mix[0]);
  args.mix_rows = reinterpret_cast<const int64_t*>(mix[1]);
  args.mix_values = reinterpret_cast<const double*>(mix[2]);
  args.out = to.data();
  py::gil_scoped_release nogil;
  cuda::launch_select(args, reinterpret_cast<const float*>(mix[3]),
                      reinterpret_cast<int32_t*>(flags), device, stream);
}

struct GramCall {
  std::vector<const void*> rows;
  GramArgs args;

  GramCall(const Addresses& x, int64_t n, const std::vector<int64_t>& starts,
           const std::vector<int>& dtype, int kind, bool wide,
           const std::vector<int64_t>& segment_starts)
      : rows(pointers<const void>(x)), args{} {
    FLCORE_CHECK(!starts.empty() && !segment_starts.empty(), "starts: expected at least one");
    check_table(x, n, std::vector<int64_t>(starts.size() - 1), dtype);
    FLCORE_CHECK(n >= 1, "rows: expected at least one");
    FLCORE_CHECK(kind >= 0 && kind < GRAM_KIND_COUNT, "kind: unknown code ", kind);
    FLCORE_CHECK(segment_starts.back() == starts.back(), "segment_starts: expected to end at ",
                 starts.back());
    args.n = n;
    args.layers = int64_t(dtype.size());
    args.starts = starts.data();
    args.dtype = dtype.data();
    args.rows = rows.data();
    args.kind = kind;
    args.wide = wide;
    args.segments = int64_t(segment_starts.size()) - 1;
    args.segment_starts = segment_starts.data();
  }
};

static int64_t gram_workspace(int64_t n, const std::vector<int64_t>& starts,
                              const std::vector<int>& dtype, int kind, bool wide) {
  const GramCall call(Addresses(size_t(n) * dtype.size()), n, starts, dtype, kind, wide, starts);
  return cuda::gram_workspace(call.args);
}

static void gram(const Addresses& rows, int64_t n, const std::vector<int64_t>& starts,
                 const std::vector<int>& dtype, int kind, bool wide,
                 const std::vector<int64_t>& segment_starts, uintptr_t workspace, uintptr_t out,
                 int device, uintptr_t stream) {
  const GramCall call(rows, n, starts, dtype, kind, wide, segment_starts);
  py::gil_scoped_release nogil;
  cuda::launch_gram(call.args, reinterpret_cast<double*>(workspace), reinterpret_cast<double*>(out),
                    device, stream);
}

// layers: addresses on the device of starts int64 [layers + 1], dtype int32 [layers] and addresses of
// the layers int64 [layers].
static void rotate(int64_t numel, int64_t count, const std::array<uintptr_t, 3>& layers,
                   const py::dict& state, int bits, int64_t block, int measure, bool check,
                   uint64_t seed, uint64_t round, uintptr_t scales, uintptr_t codes,
                   uintptr_t flags, int device, uintptr_t stream) {
  FLCORE_CHECK(numel >= 0 && count >= (numel > 0 ? 1 : 0), "layers: expected at least one");
  FLCORE_CHECK(bits >= 1 && bits <= ROTATION_BITS, "bits: expected 1 to ", ROTATION_BITS, ", got ",
               bits);
  FLCORE_CHECK(block >= ROTATION_MIN_BLOCK && block <= BLOCK_MAX && !(block & (block - 1)),
               "block: expected a power of two from ", ROTATION_MIN_BLOCK, " to ", BLOCK_MAX,
               ", got ", block);
  const FeedbackCall feedback({}, {}, {}, state, seed, round, 1);
  QuantizeArgs args = {};
  args.feedback = feedback.args;
  args.feedback.numel = numel;
  args.feedback.layers = count;
  args.feedback.starts = reinterpret_cast<const int64_t*>(layers[0]);
  args.feedback.dtype = reinterpret_cast<const int*>(layers[1]);
  args.feedback.grads = reinterpret_cast<const void* const*>(layers[2]);
  args.codec.codec = CODEC_ROTATED;
  args.codec.bits = bits;
  args.codec.bucket = block;
  args.codec.measure = measure;
  args.codec.rotation = philox_stream(seed, uint32_t(round), STREAM_ROTATION, 0);
  args.check = check;
  args.scales = reinterpret_cast<uint8_t*>(scales);
  args.codes = reinterpret_cast<uint8_t*>(codes);
  py::gil_scoped_release nogil;
  cuda::launch_rotate(args, reinterpret_cast<int32_t*>(flags), device, stream);
}

}  // namespace flcore

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  using namespace flcore;
  bind_cuda_compression(m);
  bind_cuda_qmatmul(m);
  m.def("device_count", &device_count, "(number of devices, why there is none)");
  m.attr("COMBINE_MAX_ROWS") = cuda::COMBINE_MAX_ROWS;
  m.def("combine", &combine, py::arg("rows"), py::arg("weights"), py::arg("numel"),
        py::arg("dtype"), py::arg("state"), py::arg("out"), py::arg("accumulate"),
        py::arg("divisor"), py::arg("flags"), py::arg("device"), py::arg("stream"),
        "Weighted sum of client rows (kernels/combine.cu); CombineFlags are or-ed into flags[0].");
  m.def("nonfinite", &nonfinite, py::arg("rows"), py::arg("n"), py::arg("numel"), py::arg("dtype"),
        py::arg("flags"), py::arg("device"), py::arg("stream"),
        "flags[i] = 1 for each row that holds a NaN or an infinity.");
  m.def("random", &fill_random, py::arg("out"), py::arg("numel"), py::arg("form"), py::arg("seed"),
        py::arg("round"), py::arg("tensor"), py::arg("client"), py::arg("offset"),
        py::arg("device"), py::arg("stream"),
        "A stretch of a Philox stream (kernels/rng.cu) into uint32 or float32.");
  m.attr("SELECT_MAX_ROWS") = cuda::SELECT_MAX_ROWS;
  m.def("select", &flcore::select, py::arg("rows"), py::arg("n"), py::arg("numel"),
        py::arg("dtype"), py::arg("op"), py::arg("median"), py::arg("f"), py::arg("keep"), py::arg("count"),
        py::arg("mix"), py::arg("out"), py::arg("flags"), py::arg("device"), py::arg("stream"),
        "Order statistics (kernels/select.cu); SelectFlags are or-ed into flags[0].");
  m.def("gram_workspace", &gram_workspace, py::arg("n"), py::arg("starts"), py::arg("dtype"),
        py::arg("kind"), py::arg("wide"), "float64 values of the workspace of gram.");
  m.def("gram", &gram, py::arg("rows"), py::arg("n"), py::arg("starts"), py::arg("dtype"),
        py::arg("kind"), py::arg("wide"), py::arg("segment_starts"), py::arg("workspace"),
        py::arg("out"), py::arg("device"), py::arg("stream"),
        "Norms, distances or products (kernels/gram.cu) into float64 [segments][entries].");
  m.def("rotate", &rotate, py::kw_only(), py::arg("numel"), py::arg("count"), py::arg("layers"),
        py::arg("state"), py::arg("bits"), py::arg("block"), py::arg("measure"), py::arg("check"),
        py::arg("seed"), py::arg("round"), py::arg("scales"), py::arg("codes"), py::arg("flags"),
        py::arg("device"), py::arg("stream"),
        "Rotated codes with feedback (kernels/rotate.cu); flags[0] becomes 1: not finite.");
}
