// The codecs of buckets in flcore._core: sections of a packet from an update, with feedback. Addresses
// arrive as integers; what they point to was checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/bindings.h"
#include "bindings/feedback_call.h"
#include "check.h"
#include "wire.h"

namespace py = pybind11;

namespace flcore {
namespace {

// One scale of a bucket, and its codes, lie where the header says.
CodecArgs codec_args(int codec, int form, int bits, int64_t bucket, int scale_dtype, int measure,
                     bool stochastic, int64_t levels, double clip, uint64_t seed, uint64_t round) {
  FLCORE_CHECK(bucket >= 1 && bucket <= BUCKET_MAX, "bucket: expected 1 to ", BUCKET_MAX, ", got ",
               bucket);
  wire::Header h;
  h.codec = uint16_t(codec);
  h.index = uint8_t(form);
  h.bits = uint8_t(bits);
  h.tile = uint32_t(bucket);
  CodecArgs c = {};
  c.codec = codec;
  c.form = form;
  c.bits = bits;
  c.bucket = bucket;
  c.scale_dtype = scale_dtype;
  c.scale_stride = wire::scales_per_bucket(codec) * wire::value_bytes(scale_dtype);
  c.code_stride = wire::bucket_code_bytes(h, bucket);
  c.measure = measure;
  c.stochastic = stochastic;
  c.levels = levels;
  c.clip = clip;
  c.rounding = philox_stream(seed, uint32_t(round), STREAM_ROUNDING, 0);
  c.rotation = philox_stream(seed, uint32_t(round), STREAM_ROTATION, 0);
  return c;
}

bool quantize(const Addresses& layers, const std::vector<int64_t>& numel,
              const std::vector<int>& dtype, const py::dict& state, bool in_place, int codec,
              int form, int bits, int64_t bucket, int scale_dtype, int measure, bool stochastic,
              int64_t levels, double clip, uint64_t seed, uint64_t round, uintptr_t scales,
              uintptr_t codes, int threads) {
  FLCORE_CHECK(codec >= 0 && codec < wire::CODEC_COUNT, "codec: unknown code ", codec);
  const FeedbackCall feedback(layers, numel, dtype, state, seed, round, threads);
  QuantizeArgs args = {};
  args.feedback = feedback.args;
  args.codec = codec_args(codec, form, bits, bucket, scale_dtype, measure, stochastic, levels,
                          clip, seed, round);
  args.check = in_place;
  args.scales = reinterpret_cast<uint8_t*>(scales);
  args.codes = reinterpret_cast<uint8_t*>(codes);
  const auto& kernel = *cpu().quantize;
  const Scratch scratch(4 * kernel.scratch(args) * threads);
  args.scratch = reinterpret_cast<float*>(scratch.data());
  py::gil_scoped_release nogil;
  return kernel.quantize(args);
}

}  // namespace

void bind_quantize(py::module_& m) {
  m.def("quantize", &quantize, py::kw_only(), py::arg("layers"), py::arg("numel"),
        py::arg("dtype"), py::arg("state"), py::arg("in_place"), py::arg("codec"), py::arg("form"),
        py::arg("bits"), py::arg("bucket"), py::arg("scale_dtype"), py::arg("measure"),
        py::arg("stochastic"), py::arg("levels"), py::arg("clip"), py::arg("seed"),
        py::arg("round"), py::arg("scales"), py::arg("codes"), py::arg("threads"),
        "Scales and codes of buckets, state update (csrc/cpu/quantize.isa.cpp); False: not finite.");
}

}  // namespace flcore
