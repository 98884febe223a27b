// Quantisation of activations, and products of integer codes, of flcore._core.
#include <pybind11/pybind11.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/qmatmul_call.h"
#include "check.h"

namespace py = pybind11;

namespace flcore {
namespace {

void check_kind(const QWeight& w) {
  FLCORE_CHECK(w.kind == QW_INT || w.kind == QW_FLOAT_ZERO,
               "kind: expected codes that stand for integers, got ", w.kind);
}

void check_block(const QWeight& w, int64_t act_block) {
  FLCORE_CHECK(act_block == 0 || act_block >= w.k || w.group >= w.k || act_block % w.group == 0 ||
                   w.group % act_block == 0,
               "act_block: expected a divisor or a multiple of the group ", w.group, ", got ",
               act_block);
}

void qmatmul_int8(const py::dict& weight, const py::dict& call, bool asymmetric,
                  uintptr_t code_sums) {
  QMatmulArgs args = qmatmul_args(weight, call, false);
  check_kind(args.w);
  if (!args.m || !args.w.n) return;
  check_block(args.w, args.act_block);
  args.asymmetric = asymmetric;
  args.code_sums = reinterpret_cast<const int32_t*>(code_sums);
  FLCORE_CHECK(!asymmetric || args.code_sums || !args.w.k, "code_sums: no address");
  run_qmatmul(*cpu().qmatmul_int8, args);
}

void qmatmul_int8_plain(const QWeight& w, int64_t m, uintptr_t x, uintptr_t y, int dtype,
                        int64_t act_block, int threads) {
  QMatmulArgs args = plain_args(w, m, x, y, dtype, act_block, threads, false);
  check_kind(w);
  check_block(w, act_block);
  run_qmatmul(*cpu().qmatmul_int8, args);
}

int64_t blocks(const py::dict& weight, int64_t act_block) {
  return cpu().qmatmul_int8->blocks(quantized_weight(weight), act_block);
}

void code_sums(const py::dict& weight, int64_t act_block, uintptr_t out, int threads) {
  const QWeight w = quantized_weight(weight);
  check_kind(w);
  FLCORE_CHECK(act_block >= 0 && act_block % 16 == 0, "act_block: expected a multiple of 16");
  FLCORE_CHECK(out || !w.n || !w.k, "out: no address");
  py::gil_scoped_release nogil;
  cpu().qmatmul_int8->code_sums(w, act_block, reinterpret_cast<int32_t*>(out),
                                threads < 1 ? 1 : threads);
}

void quantize_activation(uintptr_t x, int x_dtype, int64_t rows, int64_t k, int64_t x_stride,
                         int64_t block, bool asymmetric, uintptr_t codes, uintptr_t scales,
                         uintptr_t sums, uintptr_t zeros, int threads) {
  FLCORE_CHECK(x_dtype == F32 || x_dtype == F16 || x_dtype == BF16,
               "x_dtype: expected 1, 2 or 3, got ", x_dtype);
  FLCORE_CHECK(rows >= 0 && k >= 0, "rows, k: must not be negative");
  if (rows == 0 || k == 0) return;
  FLCORE_CHECK(block >= 1 && block <= k, "block: expected 1 to ", k, ", got ", block);
  FLCORE_CHECK(x && codes && scales && sums && (zeros || !asymmetric), "no address");
  const ActQuantArgs args{rows,
                          k,
                          reinterpret_cast<const void*>(x),
                          x_dtype,
                          x_stride,
                          block,
                          asymmetric,
                          reinterpret_cast<void*>(codes),
                          reinterpret_cast<float*>(scales),
                          reinterpret_cast<int32_t*>(sums),
                          reinterpret_cast<uint8_t*>(zeros),
                          threads < 1 ? 1 : threads};
  py::gil_scoped_release nogil;
  cpu().act_quant->quantize(args);
}

}  // namespace

void bind_qmatmul_int8(py::module_& m) {
  m.def("qmatmul_int8", &qmatmul_int8, py::arg("weight"), py::arg("call"), py::arg("asymmetric"),
        py::arg("code_sums"),
        "y = x W^T + bias + low up^T with x quantised (csrc/cpu/qmatmul_int8.isa.cpp).");
  m.def("qmatmul_int8_plain", &qmatmul_int8_plain, py::arg("weight"), py::arg("m"), py::arg("x"),
        py::arg("y"), py::arg("dtype"), py::arg("act_block"), py::arg("threads"),
        "The same for contiguous rows, symmetric, without what is added.");
  m.def("qmatmul_int8_blocks", &blocks, py::arg("weight"), py::arg("act_block"),
        "Blocks of k that are summed in integers.");
  m.def("qmatmul_int8_code_sums", &code_sums, py::arg("weight"), py::arg("act_block"),
        py::arg("out"), py::arg("threads"),
        "Sums of codes, int32 [blocks of 16 rows][blocks of k][16].");
  m.def("quantize_activation", &quantize_activation, py::arg("x"), py::arg("x_dtype"),
        py::arg("rows"), py::arg("k"), py::arg("x_stride"), py::arg("block"),
        py::arg("asymmetric"), py::arg("codes"), py::arg("scales"), py::arg("sums"),
        py::arg("zeros"), py::arg("threads"),
        "Rows of x to 8 bits (csrc/cpu/act_quant.isa.cpp).");
}

}  // namespace flcore
