// Secure sums of flcore._core: fixed-point words, masks, sums modulo 2^b.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string_view>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

namespace py = pybind11;

namespace flcore {

constexpr size_t KEY_BYTES = 32, NONCE_BYTES = 12;

static uint32_t little_endian(const char* bytes) {
  uint32_t word = 0;
  for (int k = 3; k >= 0; --k) word = word << 8 | uint8_t(bytes[k]);
  return word;
}

// `secrets` holds key and nonce of each stream, one after the other.
static std::vector<MaskStream> mask_streams(std::string_view secrets,
                                            const std::vector<bool>& negative) {
  FLCORE_CHECK(secrets.size() == negative.size() * (KEY_BYTES + NONCE_BYTES),
               "masks: expected ", KEY_BYTES + NONCE_BYTES, " bytes and a sign each, got ",
               secrets.size(), " bytes and ", negative.size(), " signs");
  std::vector<MaskStream> streams(negative.size());
  const char* at = secrets.data();
  for (size_t s = 0; s < streams.size(); ++s) {
    for (uint32_t& word : streams[s].key) word = little_endian(at), at += 4;
    for (uint32_t& word : streams[s].nonce) word = little_endian(at), at += 4;
    streams[s].negative = negative[s];
  }
  return streams;
}

static MaskSet mask_set(const std::vector<MaskStream>& streams, int64_t position, int64_t numel) {
  FLCORE_CHECK(numel >= 0 && position >= 0 && position <= MASK_LENGTH - numel,
               "position + numel: expected at most 2^36, got ", position, " + ", numel);
  return {int64_t(streams.size()), streams.data(), position};
}

static uint32_t low_bits(int bits) {
  FLCORE_CHECK(bits >= 1 && bits <= 32, "bits: expected 1 to 32, got ", bits);
  return uint32_t((uint64_t(1) << bits) - 1);
}

static int64_t quantize(uintptr_t x, int dtype, int64_t numel, uintptr_t out, double scale,
                        double clip, double levels, double steps_per_unit, bool stochastic,
                        uint64_t seed, uint32_t round, uint32_t tensor, uint32_t client,
                        int64_t element, std::string_view secrets,
                        const std::vector<bool>& negative, int64_t position, int bits,
                        int threads) {
  FLCORE_CHECK(dtype >= 0 && dtype < DTYPE_COUNT, "dtype: unknown code ", dtype);
  const auto streams = mask_streams(secrets, negative);
  const MaskSet masks = mask_set(streams, position, numel);
  FLCORE_CHECK(element >= 0 && (!stochastic || element <= PHILOX_LENGTH - numel),
               "element + numel: expected at most 2^34, got ", element, " + ", numel);
  const MaskQuantizeArgs args{numel,
                              dtype,
                              reinterpret_cast<const void*>(x),
                              reinterpret_cast<uint32_t*>(out),
                              scale,
                              clip,
                              levels,
                              steps_per_unit,
                              stochastic,
                              philox_stream(seed, round, tensor, client),
                              element,
                              masks,
                              low_bits(bits),
                              threads};
  py::gil_scoped_release nogil;
  return cpu().mask->quantize(args);
}

static void add(uintptr_t words, uintptr_t out, int64_t numel, std::string_view secrets,
                const std::vector<bool>& negative, int64_t position, int bits, int threads) {
  const auto streams = mask_streams(secrets, negative);
  const MaskAddArgs args{numel,
                         reinterpret_cast<const uint32_t*>(words),
                         reinterpret_cast<uint32_t*>(out),
                         mask_set(streams, position, numel),
                         low_bits(bits),
                         threads};
  py::gil_scoped_release nogil;
  cpu().mask->add(args);
}

static void sum(const std::vector<uintptr_t>& rows, uintptr_t acc, int64_t numel, bool fresh,
                int bits, int threads) {
  const auto pointers_to_rows = pointers<const uint32_t>(rows);
  const MaskSumArgs args{int64_t(rows.size()), numel,          pointers_to_rows.data(),
                         reinterpret_cast<uint32_t*>(acc), fresh, low_bits(bits), threads};
  py::gil_scoped_release nogil;
  cpu().mask->sum(args);
}

static int64_t dequantize(uintptr_t words, uintptr_t out, int64_t numel, int dtype, double top,
                          double factor, int threads) {
  FLCORE_CHECK(dtype >= 0 && dtype < DTYPE_COUNT, "dtype: unknown code ", dtype);
  const MaskDequantizeArgs args{numel, reinterpret_cast<const uint32_t*>(words), top, factor,
                                dtype, reinterpret_cast<void*>(out), threads};
  py::gil_scoped_release nogil;
  return cpu().mask->dequantize(args);
}

void bind_mask(py::module_& m) {
  m.def("mask_quantize", &quantize, py::arg("x"), py::arg("dtype"), py::arg("numel"),
        py::arg("out"), py::arg("scale"), py::arg("clip"), py::arg("levels"),
        py::arg("steps_per_unit"), py::arg("stochastic"), py::arg("seed"), py::arg("round"),
        py::arg("tensor"), py::arg("client"), py::arg("element"), py::arg("secrets"),
        py::arg("negative"), py::arg("position"), py::arg("bits"), py::arg("threads"),
        "Fixed-point words plus masks (csrc/cpu/mask.isa.cpp); values clipped, or -1: not finite.");
  m.def("mask_add", &add, py::arg("words"), py::arg("out"), py::arg("numel"), py::arg("secrets"),
        py::arg("negative"), py::arg("position"), py::arg("bits"), py::arg("threads"),
        "Add keystreams to words.");
  m.def("mask_sum", &sum, py::arg("rows"), py::arg("acc"), py::arg("numel"), py::arg("fresh"),
        py::arg("bits"), py::arg("threads"), "Add rows of words to an accumulator, modulo 2^bits.");
  m.def("mask_dequantize", &dequantize, py::arg("words"), py::arg("out"), py::arg("numel"),
        py::arg("dtype"), py::arg("top"), py::arg("factor"), py::arg("threads"),
        "(2 words - top) factor; returns the number of words above top.");
}

}  // namespace flcore
