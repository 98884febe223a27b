// QMatmulArgs from two dicts: a weight, as QuantizedTensor.kernel_args() gives it, and a call, as
// flcore/ops/_qmatmul_call.py does. Shared by qmatmul, qmatmul_int8 and qmatmul_dx.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

namespace flcore {

// A weight: n, k, bits, kind, group, codes, scales, scale_dtype, zeros, table; addresses are
// integers, 0 where there is nothing.
inline QWeight quantized_weight(const pybind11::dict& fields) {
  const auto number = [&](const char* name) { return fields[name].cast<int64_t>(); };
  const auto at = [&](const char* name) {
    return reinterpret_cast<const void*>(fields[name].cast<uintptr_t>());
  };
  QWeight w = {};
  w.n = number("n");
  w.k = number("k");
  w.bits = int(number("bits"));
  w.kind = int(number("kind"));
  w.group = number("group");
  w.codes = static_cast<const uint8_t*>(at("codes"));
  w.scales = at("scales");
  w.scale_dtype = int(number("scale_dtype"));
  w.zeros = at("zeros");
  w.table = static_cast<const float*>(at("table"));
  FLCORE_CHECK(w.n >= 0 && w.k >= 0, "n, k: must not be negative, got ", w.n, " x ", w.k);
  FLCORE_CHECK(w.bits == 2 || w.bits == 3 || w.bits == 4 || w.bits == 8,
               "bits: expected 2, 3, 4 or 8, got ", w.bits);
  FLCORE_CHECK(w.kind >= 0 && w.kind < QW_KIND_COUNT, "kind: unknown code ", w.kind);
  FLCORE_CHECK(w.kind != QW_TABLE || (w.bits == 4 && w.table),
               "table: expected 16 levels for codes of 4 bits, got ", w.bits, " bits");
  FLCORE_CHECK((w.kind != QW_E4M3 && w.kind != QW_E5M2) || w.bits == 8,
               "bits: expected 8 for fp8, got ", w.bits);
  FLCORE_CHECK(w.group >= 1 && (w.group >= w.k || w.group % 16 == 0),
               "group: expected a multiple of 16, or at least k = ", w.k, ", got ", w.group);
  FLCORE_CHECK(w.scale_dtype == F32 || w.scale_dtype == F16 || w.scale_dtype == BF16,
               "scale_dtype: expected 1, 2 or 3, got ", w.scale_dtype);
  const bool empty = w.n == 0 || w.k == 0;
  FLCORE_CHECK(empty || (w.codes && w.scales), "codes, scales: no address");
  FLCORE_CHECK(empty || w.kind != QW_FLOAT_ZERO || w.zeros, "zeros: no address");
  return w;
}

// A call: m, x, x_dtype, x_stride, y, y_dtype, y_stride, bias, low, up, rank, act_block, threads.
// `gradient`: x has n columns and y has k (qmatmul_dx), else the other way round.
inline QMatmulArgs qmatmul_args(const pybind11::dict& weight, const pybind11::dict& fields,
                                bool gradient) {
  const auto number = [&](const char* name) { return fields[name].cast<int64_t>(); };
  const auto at = [&](const char* name) {
    return reinterpret_cast<void*>(fields[name].cast<uintptr_t>());
  };
  QMatmulArgs a = {};
  a.w = quantized_weight(weight);
  a.m = number("m");
  a.x = at("x");
  a.x_dtype = int(number("x_dtype"));
  a.x_stride = number("x_stride");
  a.y = at("y");
  a.y_dtype = int(number("y_dtype"));
  a.y_stride = number("y_stride");
  a.bias = static_cast<const float*>(at("bias"));
  a.low = static_cast<const float*>(at("low"));
  a.up = static_cast<const float*>(at("up"));
  a.rank = number("rank");
  a.act_block = number("act_block");
  a.threads = int(number("threads"));
  if (a.threads < 1) a.threads = 1;
  const int64_t inputs = gradient ? a.w.n : a.w.k, outputs = gradient ? a.w.k : a.w.n;
  for (int d : {a.x_dtype, a.y_dtype})
    FLCORE_CHECK(d == F32 || d == F16 || d == BF16, "x_dtype, y_dtype: expected 1 to 3, got ", d);
  FLCORE_CHECK(a.m >= 0, "m: must not be negative, got ", a.m);
  FLCORE_CHECK(!a.m || !inputs || a.x, "x: no address");
  FLCORE_CHECK(!a.m || !outputs || a.y, "y: no address");
  FLCORE_CHECK(a.m <= 1 || a.y_stride >= outputs, "y_stride: expected at least ", outputs,
               ", got ", a.y_stride);
  FLCORE_CHECK(a.rank >= 0 && (!a.rank || !a.m || !outputs || (a.low && a.up)),
               "low, up: expected addresses for rank ", a.rank);
  FLCORE_CHECK(!gradient || !a.bias, "bias: a gradient has none");
  FLCORE_CHECK(a.act_block >= 0 && a.act_block % 16 == 0,
               "act_block: expected a multiple of 16, or 0, got ", a.act_block);
  return a;
}

// Runs a checked call on scratch of its own, without the GIL.
template <class Fns>
void run_qmatmul(const Fns& fns, QMatmulArgs& args) {
  pybind11::gil_scoped_release nogil;
  const Scratch scratch(fns.scratch(args));
  args.scratch = scratch.data();
  fns.run(args);
}

// What the short way of a product takes (flcore/ops/_qmatmul_call.py): addresses of contiguous rows
// of one dtype and a weight that was checked when its QWeight was made.
inline QMatmulArgs plain_args(const QWeight& w, int64_t m, uintptr_t x, uintptr_t y, int dtype,
                              int64_t act_block, int threads, bool gradient) {
  FLCORE_CHECK(dtype == F32 || dtype == F16 || dtype == BF16, "dtype: expected 1 to 3, got ", dtype);
  FLCORE_CHECK(m >= 1 && w.n >= 1 && w.k >= 1 && x && y, "m, n, k, x, y: expected rows");
  FLCORE_CHECK(act_block >= 0 && act_block % 16 == 0,
               "act_block: expected a multiple of 16, or 0, got ", act_block);
  QMatmulArgs a = {};
  a.w = w;
  a.m = m;
  a.x = reinterpret_cast<const void*>(x);
  a.y = reinterpret_cast<void*>(y);
  a.x_dtype = a.y_dtype = dtype;
  a.x_stride = gradient ? w.n : w.k;
  a.y_stride = gradient ? w.k : w.n;
  a.act_block = act_block;
  a.threads = threads < 1 ? 1 : threads;
  return a;
}

// m.def(name) and m.def(name_plain): one product.
inline void def_qmatmul(pybind11::module_& m, const char* name,
                        const QMatmulFns* CpuTable::*kernel, bool gradient, const char* doc) {
  namespace py = pybind11;
  m.def(
      name,
      [kernel, gradient](const py::dict& weight, const py::dict& call) {
        QMatmulArgs args = qmatmul_args(weight, call, gradient);
        if (args.m && (gradient ? args.w.k : args.w.n)) run_qmatmul(*(cpu().*kernel), args);
      },
      py::arg("weight"), py::arg("call"), doc);
  m.def(
      (std::string(name) + "_plain").c_str(),
      [kernel, gradient](const QWeight& w, int64_t rows, uintptr_t x, uintptr_t y, int dtype,
                         int64_t act_block, int threads) {
        QMatmulArgs args = plain_args(w, rows, x, y, dtype, act_block, threads, gradient);
        run_qmatmul(*(cpu().*kernel), args);
      },
      py::arg("weight"), py::arg("m"), py::arg("x"), py::arg("y"), py::arg("dtype"),
      py::arg("act_block"), py::arg("threads"), doc);
}

}  // namespace flcore
