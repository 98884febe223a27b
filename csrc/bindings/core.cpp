// flcore._core: build facts, memory probes, and one register function a family.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace flcore {

static py::dict build() {
  const char* names[8];
  bool usable[8];
  const int count = cpu_levels(names, usable, 8);
  py::list built, can_run;
  for (int i = 0; i < count; ++i) {
    built.append(names[i]);
    if (usable[i]) can_run.append(names[i]);
  }
  py::dict d;
  d["isa_built"] = built;
  d["isa_usable"] = can_run;
  d["compiler"] = std::string(__VERSION__);
  d["debug"] = std::string(FLCORE_BUILD_TYPE) == "Debug" || std::string(FLCORE_SANITIZED) != "";
  d["sanitize"] = std::string(FLCORE_SANITIZED);
#ifdef _OPENMP
  d["openmp"] = _OPENMP;
#else
  d["openmp"] = py::none();
#endif
  return d;
}

static int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Python classes live in flcore/errors.py; the module passes them in once.
static void translate_errors(py::object input_error, py::object packet_error) {
  static PyObject* input = input_error.release().ptr();
  static PyObject* packet = packet_error.release().ptr();
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const PacketError& e) {
      PyErr_SetString(packet, e.what());
    } catch (const Error& e) {
      PyErr_SetString(input, e.what());
    }
  });
}

}  // namespace flcore

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  using namespace flcore;
  m.def("build", &build, "Facts fixed at compile time and by this processor.");
  m.def("isa", [] { return std::string(cpu().name); });
  m.def("max_threads", &max_threads);
  m.def("translate_errors", &translate_errors);
  m.def(
      "address", [](const py::array& x) { return reinterpret_cast<uintptr_t>(x.data()); },
      py::arg("x"), "Address of the first element (0.1 us; asking NumPy takes 2 us).");
  m.attr("DTYPES") = py::make_tuple("float64", "float32", "float16", "bfloat16");
  m.attr("BIN_UNIT") = py::make_tuple(BIN_UNIT[0], BIN_UNIT[1], BIN_UNIT[2]);
  m.attr("BIN_LIMIT") = BIN_LIMIT;
  m.attr("BIN_MAX_TERMS") = BIN_MAX_TERMS;
  m.def(
      "probe_read",
      [](uintptr_t src, int64_t bytes, int threads) {
        py::gil_scoped_release nogil;
        return cpu().probe->read(reinterpret_cast<const void*>(src), bytes, threads);
      },
      py::arg("src"), py::arg("bytes"), py::arg("threads"));
  m.def(
      "probe_copy",
      [](uintptr_t dst, uintptr_t src, int64_t bytes, int threads) {
        py::gil_scoped_release nogil;
        cpu().probe->copy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes,
                          threads);
      },
      py::arg("dst"), py::arg("src"), py::arg("bytes"), py::arg("threads"));
  const auto arithmetic = [&](const char* name, int64_t (*ProbeFns::*probe)(int64_t, int, float*)) {
    m.def(
        name,
        [probe](int64_t rounds, int threads) {
          std::vector<float> sink(size_t(threads > 0 ? threads : 1));
          py::gil_scoped_release nogil;
          return (cpu().probe->*probe)(rounds, int(sink.size()), sink.data());
        },
        py::arg("rounds"), py::arg("threads"), "Returns the operations on one float32.");
  };
  arithmetic("probe_exchanges", &ProbeFns::exchanges);
  arithmetic("probe_products", &ProbeFns::products);
  arithmetic("probe_differences", &ProbeFns::differences);
  bind_aggregation(m);
  bind_wire(m);
  bind_quantize(m);
  bind_indices(m);
  bind_randk(m);
  bind_compression(m);
  bind_sparsify(m);
  bind_rng(m);
  bind_moments(m);
  bind_mask(m);
  bind_select(m);
  bind_gram(m);
  bind_low_rank(m);
  bind_sketch(m);
  bind_vote(m);
  bind_lut_add(m);
  bind_rowloss(m);
  bind_packet_image(m);
  bind_perp_grad(m);
  bind_local_step(m);
  bind_stablemax(m);
  bind_weight_quant(m);
  bind_qembedding(m);
  bind_qmatmul(m);
  bind_qmatmul_dx(m);
  bind_qmatmul_int8(m);
}
