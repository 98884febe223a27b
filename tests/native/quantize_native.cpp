// Codes of buckets without Python: every codec at odd sizes, buckets and addresses, with state of
// every form, decoded as a whole, in parts and into layers. Every buffer ends where its allocation
// ends, so that a byte read or written outside is an error of the address sanitizer.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "api.h"
#include "expect.h"
#include "wire.h"

using namespace flcore;

// `bytes` bytes at an address `shift` off the allocation's start, ending where it ends.
struct Exact {
  Exact(int64_t bytes, int shift) : memory(new uint8_t[size_t(bytes + shift)]) {
    data = memory.get() + shift;
    std::memset(data, 0xA5, size_t(bytes));
  }
  float* floats() { return reinterpret_cast<float*>(data); }
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* data;
};

struct Aligned {
  explicit Aligned(int64_t floats)
      : data(static_cast<float*>(::operator new(size_t(4 * floats), std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  float* data;
};

struct Case {
  int codec, form, bits, measure;
  bool stochastic;
  int scale_dtype;
};

static const Case CASES[] = {
    {CODEC_SIGN, 0, 1, MEASURE_DEFAULT, false, F32},
    {CODEC_SIGN, 0, 1, MEASURE_L2, false, BF16},
    {CODEC_UNIFORM, 0, 8, MEASURE_DEFAULT, false, F32},
    {CODEC_UNIFORM, 0, 7, MEASURE_L2, true, F32},
    {CODEC_UNIFORM, 0, 5, MEASURE_DEFAULT, true, BF16},
    {CODEC_UNIFORM, 0, 4, MEASURE_DEFAULT, false, F32},
    {CODEC_UNIFORM, 0, 3, MEASURE_DEFAULT, true, F32},
    {CODEC_UNIFORM, 0, 2, MEASURE_DEFAULT, false, F32},
    {CODEC_AFFINE, 0, 6, MEASURE_DEFAULT, false, BF16},
    {CODEC_AFFINE, 0, 1, MEASURE_DEFAULT, true, F32},
    {CODEC_AFFINE, 0, 1, MEASURE_TWO_MEANS, false, F32},
    {CODEC_TERNARY, 0, 2, MEASURE_DEFAULT, true, F32},
    {CODEC_TERNARY, 1, 2, MEASURE_DEFAULT, true, F32},
    {CODEC_DENSE, 0, 16, MEASURE_DEFAULT, false, BF16},
    {CODEC_DENSE, 0, 16, MEASURE_DEFAULT, true, F16},
    {CODEC_DENSE, 0, 32, MEASURE_DEFAULT, false, F32},
    {CODEC_NATURAL, 0, 9, MEASURE_DEFAULT, true, F32},
    {CODEC_NATURAL, 1, 8, MEASURE_DEFAULT, false, F32},
    {CODEC_MINIFLOAT, 1, 8, MEASURE_DEFAULT, false, F32},
    {CODEC_MINIFLOAT, 3, 6, MEASURE_DEFAULT, true, WIRE_E8M0},
};

static wire::Header header_of(const Case& c, int64_t numel, int64_t bucket) {
  wire::Header h;
  h.codec = uint16_t(c.codec);
  h.numel = uint64_t(numel);
  h.index = uint8_t(c.form);
  h.bits = uint8_t(c.bits);
  h.value_dtype = uint8_t(c.scale_dtype);
  h.tile = uint32_t(bucket);
  return h;
}

static QuantizeArgs args_of(const Case& c, const wire::Header& h) {
  QuantizeArgs x = {};
  x.codec.codec = c.codec;
  x.codec.form = c.form;
  x.codec.bits = c.bits;
  x.codec.bucket = h.tile;
  x.codec.scale_dtype = c.scale_dtype;
  x.codec.scale_stride = wire::scales_per_bucket(c.codec) * wire::value_bytes(c.scale_dtype);
  x.codec.code_stride = wire::bucket_code_bytes(h, h.tile);
  x.codec.measure = c.measure;
  x.codec.stochastic = c.stochastic;
  x.codec.levels = c.codec == CODEC_UNIFORM ? (1 << (c.bits - 1)) - 1 : 0;
  x.codec.clip = c.form == 1 ? 2.5 : 0;
  x.codec.rounding = philox_stream(7, 3, STREAM_ROUNDING, 0);
  return x;
}

// D must be the same, however it is read.
static void decode(const wire::Header& h, const QuantizeArgs& x, const float* want, int shift) {
  const int64_t numel = int64_t(h.numel), first = numel / 3;
  PacketView view = {};
  view.codec = h.codec;
  view.form = h.index;
  view.bits = h.bits;
  view.value_dtype = h.value_dtype;
  view.weight = 1;
  view.numel = view.k = numel;
  view.bucket = h.tile;
  view.scales = x.scales;
  view.codes = x.codes;
  view.scale_stride = x.codec.scale_stride;
  view.code_stride = x.codec.code_stride;
  Exact low(4 * first, shift), high(8 * (numel - first), shift);
  void* out[2] = {low.data, high.data};
  const int64_t starts[3] = {0, first, numel};
  const int dtypes[2] = {F32, F64};
  const DecodeArgs args{numel, 1, &view, 2, starts, dtypes, out, 2};
  const auto check = [&](double factor) {
    for (int64_t i = 0; i < numel; ++i) {
      double d;
      if (i < first) {
        float f;
        std::memcpy(&f, low.data + 4 * i, 4);
        d = double(f);
      } else {
        std::memcpy(&d, high.data + 8 * (i - first), 8);
      }
      EXPECT(d == factor * double(want[i]), "coordinate %ld: %g, expected %g", long(i), d,
             factor * double(want[i]));
    }
  };
  cpu().decode->dense(args);
  check(1);
  cpu().decode->add(args);
  check(2);
  const Aligned work(DECODE_WORK);
  std::mt19937 random(unsigned(numel + shift));
  for (int t = 0; t < 5 && numel; ++t) {
    const int64_t begin = int64_t(random() % uint64_t(numel)),
                  count = int64_t(random() % uint64_t(numel - begin)) + 1;
    Exact row(4 * count, shift);
    cpu().decode->rows(&view, 1, begin, count, row.floats(), count, work.data);
    for (int64_t i = 0; i < count; ++i) {
      float value;
      std::memcpy(&value, row.data + 4 * i, 4);
      EXPECT(value == want[begin + i], "coordinate %ld of rows of %ld from %ld", long(i),
             long(count), long(begin));
    }
  }
}

static void round_trip(const Case& c, int64_t numel, int64_t bucket, int shift, bool e, bool in_place,
                       std::mt19937& random) {
  const wire::Header h = header_of(c, numel, bucket);
  QuantizeArgs x = args_of(c, h);
  Exact g(4 * numel, shift), memory(4 * numel, 0), spare(4 * numel, 0), held(4 * numel, 0);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < numel; ++i) {
    const float value = normal(random);
    std::memcpy(g.data + 4 * i, &value, 4);
    memory.floats()[i] = normal(random);
    held.floats()[i] = 0;
  }
  const int64_t starts[2] = {0, numel};
  const int dtypes[1] = {F32};
  const void* grads[1] = {g.data};
  FeedbackArgs& f = x.feedback;
  f.numel = numel;
  f.layers = 1;
  f.starts = starts;
  f.dtype = dtypes;
  f.grads = grads;
  f.a = f.b = f.q = 1;
  f.state_dtype = F32;
  f.threads = 2;
  if (e) {
    f.e = memory.data;
    f.e_new = in_place ? memory.data : spare.data;
  }
  f.h = f.h_new = held.floats();  // what was sent, since it starts at 0
  const int64_t buckets = (numel + bucket - 1) / bucket;
  const Exact scales(x.codec.scale_stride * buckets, shift), codes(wire::code_bytes(h), shift);
  x.scales = scales.data;
  x.codes = codes.data;
  x.check = in_place;
  const Aligned scratch(2 * cpu().quantize->scratch(x));
  x.scratch = scratch.data;
  EXPECT(cpu().quantize->quantize(x), "finite input");
  decode(h, x, held.floats(), shift);
  if (!numel) return;
  const float bad = std::nanf("");
  std::memcpy(g.data + 4 * (numel - 1), &bad, 4);
  const std::vector<float> before(memory.floats(), memory.floats() + numel);
  x.check = true;
  EXPECT(!cpu().quantize->quantize(x), "a NaN");
  EXPECT(!std::memcmp(before.data(), memory.data, size_t(4 * numel)), "the state changed");
}

int main() {
  std::mt19937 random(1);
  for (int64_t numel : {0, 1, 2, 7, 8, 9, 15, 17, 31, 33, 500, 1001, 4097, 8193})
    for (int64_t bucket : {2, 16, 33, 500, 501, 4096, 65536}) {
      const int shift = int(random() % 4);
      for (const Case& c : CASES)
        round_trip(c, numel, bucket, shift, random() % 2, random() % 2, random);
    }
  std::printf("ok %s\n", cpu().name);
}
