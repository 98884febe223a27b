// Products with quantized weights in flcore._cuda. Every address is one of the device.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "api.h"
#include "bindings/cuda_bindings.h"
#include "bindings/qmatmul_call.h"
#include "check.h"
#include "launch.h"

namespace py = pybind11;

namespace flcore {

static bool is_multiple(uintptr_t address, uintptr_t of) { return address % of == 0; }
static bool is_aligned(const void* address) {
  return is_multiple(reinterpret_cast<uintptr_t>(address), 16);
}

// What csrc/bindings/qmatmul_call.h reads, and: lookup, terms, unit, asymmetric, int8.
struct DeviceCall {
  QMatmulArgs args;
  cuda::QMatmulDevice device = {};
  bool int8;

  DeviceCall(const py::dict& weight, const py::dict& call, const py::dict& options)
      : args(qmatmul_args(weight, call, false)), int8(options["int8"].cast<bool>()) {
    device.lookup = reinterpret_cast<const void*>(options["lookup"].cast<uintptr_t>());
    device.terms = options["terms"].cast<int>();
    device.unit = options["unit"].cast<float>();
    args.asymmetric = options["asymmetric"].cast<bool>();
    const QWeight& w = args.w;
    FLCORE_CHECK(args.m >= 1 && w.n >= 1 && w.k >= 1, "m, n, k: expected at least 1, got ", args.m,
                 ", ", w.n, ", ", w.k);
    FLCORE_CHECK(is_aligned(w.codes) && is_aligned(w.scales) && is_aligned(w.zeros),
                 "codes, scales, zeros: expected addresses that are multiples of 16");
    const bool coded = w.kind != QW_INT && w.kind != QW_FLOAT_ZERO;
    FLCORE_CHECK(coded == (device.lookup != nullptr), "lookup: kind ", w.kind,
                 coded ? " needs one" : " has none");
    FLCORE_CHECK(device.terms == 1 || device.terms == 2, "terms: expected 1 or 2, got ",
                 device.terms);
    if (int8) {
      FLCORE_CHECK(!coded, "kind: expected integer codes, got ", w.kind);
      return;
    }
    FLCORE_CHECK(args.x_dtype == F16 || args.x_dtype == BF16, "x_dtype: expected 2 or 3, got ",
                 args.x_dtype);
    FLCORE_CHECK(is_aligned(args.x) && (args.m == 1 || args.x_stride % 8 == 0),
                 "x: expected rows that begin at multiples of 16 bytes");
  }
};

static int64_t fragment_bytes(const py::dict& weight) {
  return cuda::qmatmul_fragment_bytes(quantized_weight(weight));
}

static void repack(const py::dict& weight, uintptr_t out, int device, uintptr_t stream) {
  const QWeight w = quantized_weight(weight);
  FLCORE_CHECK(is_multiple(out, 4), "out: expected an address that is a multiple of 4");
  py::gil_scoped_release nogil;
  cuda::launch_qmatmul_repack(w, reinterpret_cast<uint8_t*>(out), device, stream);
}

static int64_t workspace(const py::dict& weight, const py::dict& call, const py::dict& options,
                         int device) {
  const DeviceCall c(weight, call, options);
  return cuda::qmatmul_workspace(c.args, c.device, c.int8, device);
}

static void qmatmul(const py::dict& weight, const py::dict& call, const py::dict& options,
                    uintptr_t work, int device, uintptr_t stream) {
  DeviceCall c(weight, call, options);
  FLCORE_CHECK(is_multiple(work, 256), "workspace: expected an address that is a multiple of 256");
  c.device.workspace = reinterpret_cast<void*>(work);
  py::gil_scoped_release nogil;
  cuda::launch_qmatmul(c.args, c.device, c.int8, device, stream);
}

void bind_cuda_qmatmul(py::module_& m) {
  m.def("qmatmul_fragment_bytes", &fragment_bytes, py::arg("weight"),
        "Bytes of the codes of a weight in fragment order (kernels/qmatmul.cuh).");
  m.def("qmatmul_repack", &repack, py::arg("weight"), py::arg("out"), py::arg("device"),
        py::arg("stream"), "Codes in the layout tile16 into fragment order.");
  m.def("qmatmul_workspace", &workspace, py::arg("weight"), py::arg("call"), py::arg("options"),
        py::arg("device"), "Bytes of the workspace of qmatmul.");
  m.def("qmatmul", &flcore::qmatmul, py::arg("weight"), py::arg("call"), py::arg("options"),
        py::arg("workspace"), py::arg("device"), py::arg("stream"),
        "y = x W^T + bias + low up^T (kernels/qmatmul.cu); codes in fragment order.");
}

}  // namespace flcore
