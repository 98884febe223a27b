// Moments and affine maps of layers, of flcore._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/combine_call.h"

namespace py = pybind11;

namespace flcore {

// Owns the scratch that `args` points into; the vectors of sizes belong to the caller.
struct MomentsCall {
  std::vector<int64_t> first_tile;
  std::vector<double> tiles;
  MomentsArgs args;

  MomentsCall(int64_t n, const std::vector<int64_t>& numel, uintptr_t mean, uintptr_t m2)
      : first_tile(numel.size() + 1), args{} {
    for (int64_t count : numel) FLCORE_CHECK(count >= 0, "numel: expected >= 0, got ", count);
    args.n = n;
    args.layers = int64_t(numel.size());
    args.numel = numel.data();
    args.mean = reinterpret_cast<double*>(mean);
    args.m2 = reinterpret_cast<double*>(m2);
    args.first_tile = first_tile.data();
  }
  MomentsCall(const MomentsCall&) = delete;
  MomentsCall& operator=(const MomentsCall&) = delete;

  size_t tile_count() const {
    int64_t count = 0;
    for (int64_t l = 0; l < args.layers; ++l)
      count += (args.numel[l] + MOMENT_TILE - 1) / MOMENT_TILE;
    return size_t(args.n * count);
  }
};

static void check_acc(const Addresses& acc, const std::vector<int64_t>& numel) {
  FLCORE_CHECK(acc.empty() || acc.size() == numel.size(), "acc: expected ", numel.size(),
               " addresses, got ", acc.size());
}

static void moments(const Addresses& rows, int64_t n, const std::vector<int64_t>& numel,
                    const std::vector<int>& dtype, int of, const Addresses& acc,
                    double acc_weight, double row_weight, uintptr_t mean, uintptr_t m2,
                    int threads) {
  check_table(rows, n, numel, dtype);
  check_acc(acc, numel);
  FLCORE_CHECK(of >= 0 && of < MOMENTS_OF_COUNT, "of: unknown code ", of);
  FLCORE_CHECK(of == MOMENTS_ROWS || (n == 1 && acc.size() == numel.size()),
               "acc: expected one row and one accumulator a layer");
  const auto x = pointers<const void>(rows);
  const auto a = pointers<>(acc);
  MomentsCall call(n, numel, mean, m2);
  call.tiles.resize(3 * call.tile_count());
  call.args.dtype = dtype.data();
  call.args.rows = x.data();
  call.args.of = of;
  call.args.acc = acc.empty() ? nullptr : a.data();
  call.args.acc_weight = acc_weight;
  call.args.row_weight = row_weight;
  call.args.tiles = call.tiles.data();
  call.args.threads = threads;
  py::gil_scoped_release nogil;
  cpu().moments->moments(call.args);
}

static void merge_moments(uintptr_t tiles, int64_t count, int64_t n,
                          const std::vector<int64_t>& numel, uintptr_t mean, uintptr_t m2) {
  MomentsCall call(n, numel, mean, m2);
  FLCORE_CHECK(count == int64_t(call.tile_count()), "tiles: expected ", call.tile_count(),
               ", got ", count);
  call.args.tiles = reinterpret_cast<double*>(tiles);
  py::gil_scoped_release nogil;
  cpu().moments->merge(call.args);
}

static bool affine(const Addresses& row, const std::vector<int64_t>& numel,
                   const std::vector<int>& dtype, const Addresses& acc, double acc_weight,
                   double row_weight, const std::vector<double>& scale,
                   const std::vector<double>& shift, const Addresses& out, int threads) {
  check_table(row, 1, numel, dtype);
  check_acc(acc, numel);
  for (size_t size : {scale.size(), shift.size(), out.size()})
    FLCORE_CHECK(size == numel.size(), "scale, shift, out: expected ", numel.size(),
                 " values, got ", size);
  const auto x = pointers<const void>(row);
  const auto a = pointers<const void>(acc);
  const auto y = pointers<>(out);
  std::vector<int64_t> first_tile(numel.size() + 1);
  const AffineArgs args{int64_t(numel.size()),
                        numel.data(),
                        dtype.data(),
                        x.data(),
                        acc.empty() ? nullptr : a.data(),
                        acc_weight,
                        row_weight,
                        scale.data(),
                        shift.data(),
                        y.data(),
                        first_tile.data(),
                        threads};
  py::gil_scoped_release nogil;
  return cpu().moments->affine(args);
}

void bind_moments(py::module_& m) {
  m.attr("MOMENT_TILE") = MOMENT_TILE;
  m.attr("MOMENT_LANES") = MOMENT_LANES;
  m.attr("MOMENTS_OF") = py::make_tuple(int(MOMENTS_ROWS), int(MOMENTS_ADD), int(MOMENTS_BLEND));
  m.def("moments", &moments, py::arg("rows"), py::arg("n"), py::arg("numel"), py::arg("dtype"),
        py::arg("of"), py::arg("acc"), py::arg("acc_weight"), py::arg("row_weight"),
        py::arg("mean"), py::arg("m2"), py::arg("threads"),
        "Mean and squared deviations of layers (csrc/cpu/moments.isa.cpp) into float64 arrays.");
  m.def("merge_moments", &merge_moments, py::arg("tiles"), py::arg("count"), py::arg("n"),
        py::arg("numel"), py::arg("mean"), py::arg("m2"),
        "The same from the (p, mean - p, m2) of finished tiles, which are overwritten.");
  m.def("affine", &affine, py::arg("row"), py::arg("numel"), py::arg("dtype"), py::arg("acc"),
        py::arg("acc_weight"), py::arg("row_weight"), py::arg("scale"), py::arg("shift"),
        py::arg("out"), py::arg("threads"),
        "scale * values + shift for each layer; true when a result is not finite.");
}

}  // namespace flcore
