// THC in flcore._core: codes on a shared grid, their integer sums, and back. Addresses arrive as
// integers; what they point to was checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/feedback_call.h"
#include "check.h"
#include "rotation.h"

namespace py = pybind11;

namespace flcore {
namespace {

void check_block(int64_t block) {
  FLCORE_CHECK(block >= ROTATION_MIN_BLOCK && block <= BLOCK_MAX && !(block & (block - 1)),
               "block: expected a power of two from ", ROTATION_MIN_BLOCK, " to ", BLOCK_MAX,
               ", got ", block);
}

void check_lanes(int bytes) {
  FLCORE_CHECK(bytes == 1 || bytes == 2 || bytes == 4, "lane_bytes: expected 1, 2 or 4, got ",
               bytes);
}

// The squared norm of u in every block; false when t or u is not finite somewhere.
bool block_norms(const Addresses& layers, const std::vector<int64_t>& numel,
                 const std::vector<int>& dtype, const py::dict& state, int64_t block,
                 uintptr_t squares, int threads) {
  check_block(block);
  const FeedbackCall feedback(layers, numel, dtype, state, 0, 0, threads);
  const Scratch scratch(4 * 6 * block * threads);  // parts of FeedbackBuffers
  const BlockNormArgs args{feedback.args, block, reinterpret_cast<double*>(squares),
                           reinterpret_cast<float*>(scratch.data())};
  py::gil_scoped_release nogil;
  return cpu().lut_add->norms(args);
}

bool thc(const Addresses& layers, const std::vector<int64_t>& numel, const std::vector<int>& dtype,
         const py::dict& state, bool in_place, int bits, int64_t block, uintptr_t norms,
         bool shared, float clip, const std::vector<uint16_t>& table, uint64_t seed, uint64_t round,
         uint32_t client, uintptr_t codes, int threads) {
  check_block(block);
  FLCORE_CHECK(bits == 2 || bits == 4, "bits: expected 2 or 4, got ", bits);
  FLCORE_CHECK(table.size() == size_t(1) << bits && table.back() <= THC_LARGEST,
               "table: expected ", 1 << bits, " values up to ", THC_LARGEST);
  const FeedbackCall feedback(layers, numel, dtype, state, seed, round, threads);
  const ThcArgs extra{reinterpret_cast<const float*>(norms), shared, feedback.args.numel, clip,
                      table.data()};
  QuantizeArgs args = {};
  args.feedback = feedback.args;
  args.codec.codec = CODEC_THC;
  args.codec.bits = bits;
  args.codec.bucket = block;
  args.codec.code_stride = block * bits / 8;
  args.codec.rounding = philox_stream(seed, uint32_t(round), STREAM_ROUNDING, client);
  args.codec.rotation = philox_stream(seed, uint32_t(round), STREAM_ROTATION, 0);
  args.codec.extra = &extra;
  args.check = in_place;
  args.codes = reinterpret_cast<uint8_t*>(codes);
  const auto& kernel = *cpu().quantize;
  const Scratch scratch(4 * kernel.scratch(args) * threads);
  args.scratch = reinterpret_cast<float*>(scratch.data());
  py::gil_scoped_release nogil;
  return kernel.quantize(args);
}

void lut_add(const Addresses& packets, const std::vector<std::array<uint8_t, 16>>& tables, int bits,
             int64_t codes, int lane_bytes, uintptr_t sums, int threads) {
  FLCORE_CHECK(bits == 2 || bits == 4, "bits: expected 2 or 4, got ", bits);
  FLCORE_CHECK(tables.size() == packets.size(), "tables: expected ", packets.size(), ", got ",
               tables.size());
  check_lanes(lane_bytes);
  uint64_t most = 0;
  for (const auto& table : tables) {
    const int last = (1 << bits) - 1;
    for (int k = 0; k <= last; ++k)
      FLCORE_CHECK(table[k] <= table[last], "tables: the last value must be the largest");
    most += table[last];
  }
  FLCORE_CHECK(most < uint64_t(1) << (8 * lane_bytes), "sums: up to ", most, " do not fit in ",
               lane_bytes, " bytes");
  const auto rows = pointers<const uint8_t>(packets);
  const LutAddArgs args{codes,       bits,       int64_t(rows.size()),
                        rows.data(), tables.empty() ? nullptr : tables[0].data(),
                        lane_bytes,  reinterpret_cast<void*>(sums), threads};
  py::gil_scoped_release nogil;
  cpu().lut_add->add(args);
}

void lut_decode(int64_t numel, int64_t block, int lane_bytes, uintptr_t sums, int64_t total, int g,
                uintptr_t norms, bool shared, float clip, uint64_t seed, uint64_t round,
                uintptr_t out, int threads) {
  check_block(block);
  check_lanes(lane_bytes);
  FLCORE_CHECK(g >= 1 && g <= THC_LARGEST, "g: expected 1 to ", THC_LARGEST, ", got ", g);
  FLCORE_CHECK(total >= 1 && total <= (int64_t(1) << 31) / (2 * block * g), "total: out of range: ",
               total);
  const LutDecodeArgs args{numel,
                           block,
                           lane_bytes,
                           reinterpret_cast<const void*>(sums),
                           total * g,
                           double(total),
                           reinterpret_cast<const float*>(norms),
                           shared,
                           clip,
                           g,
                           philox_stream(seed, uint32_t(round), STREAM_ROTATION, 0),
                           reinterpret_cast<float*>(out),
                           threads};
  py::gil_scoped_release nogil;
  cpu().lut_add->decode(args);
}

}  // namespace

void bind_lut_add(py::module_& m) {
  m.def("block_norms", &block_norms, py::kw_only(), py::arg("layers"), py::arg("numel"),
        py::arg("dtype"), py::arg("state"), py::arg("block"), py::arg("squares"),
        py::arg("threads"),
        "Squared norm of every block of an update with feedback (csrc/cpu/lut_add.isa.cpp).");
  m.def("thc", &thc, py::kw_only(), py::arg("layers"), py::arg("numel"), py::arg("dtype"),
        py::arg("state"), py::arg("in_place"), py::arg("bits"), py::arg("block"), py::arg("norms"),
        py::arg("shared"), py::arg("clip"), py::arg("table"), py::arg("seed"), py::arg("round"),
        py::arg("client"), py::arg("codes"), py::arg("threads"),
        "THC codes, state update (csrc/cpu/codes_thc.h); False: not finite.");
  m.def("lut_add", &lut_add, py::kw_only(), py::arg("packets"), py::arg("tables"), py::arg("bits"),
        py::arg("codes"), py::arg("lane_bytes"), py::arg("sums"), py::arg("threads"),
        "Sums of looked-up codes (csrc/cpu/lut_add.isa.cpp).");
  m.def("lut_decode", &lut_decode, py::kw_only(), py::arg("numel"), py::arg("block"),
        py::arg("lane_bytes"), py::arg("sums"), py::arg("total"), py::arg("g"), py::arg("norms"),
        py::arg("shared"), py::arg("clip"), py::arg("seed"), py::arg("round"), py::arg("out"),
        py::arg("threads"), "Sums of THC codes back to a mean (csrc/cpu/lut_add.isa.cpp).");
}

}  // namespace flcore
