// Rotated and THC codes and their sums on exactly sized heap buffers at odd addresses: a read
// or write one byte outside is an error of the address sanitizer. What is decoded must be what the
// encoder left in the state.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "expect.h"
#include "odd_bytes.h"
#include "rotation.h"

using namespace flcore;

struct Scratch {  // on a cache line
  explicit Scratch(int64_t floats) : memory(new float[size_t(floats) + 16]) {
    data = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
  }
  std::unique_ptr<float[]> memory;
  float* data;
};

static int64_t code_count(int64_t numel, int64_t block) {
  int64_t rest = numel % block, m = rest ? 1 : 0;
  while (m < rest) m *= 2;
  return numel - rest + m;
}

static float value(int64_t i) { return float(i * 37 % 101 - 50) / 8; }

struct Update {
  Update(int64_t n, int shift, int threads) : numel(n), memory(4 * n, shift), e(size_t(n), 0.5f) {
    for (int64_t i = 0; i < n; ++i) {
      const float x = value(i);
      std::memcpy(memory.data + 4 * i, &x, 4);
    }
    starts[0] = 0;
    starts[1] = n;
    layer = memory.data;
    args = FeedbackArgs{};
    args.numel = n;
    args.layers = 1;
    args.starts = starts;
    args.dtype = &dtype;
    args.grads = &layer;
    args.e = args.e_new = e.data();
    args.a = args.b = args.q = 1;
    args.state_dtype = F32;
    args.threads = threads;
  }
  Update(const Update&) = delete;

  void check(const std::vector<float>& d) const {
    for (int64_t i = 0; i < numel; ++i)
      EXPECT(e[size_t(i)] == 0.5f + value(i) - d[size_t(i)], "coordinate %lld of %lld",
             (long long)i, (long long)numel);
  }

  int64_t numel, starts[2];
  Bytes memory;
  std::vector<float> e;
  int dtype = F32;
  const void* layer;
  FeedbackArgs args;
};

static void encode(QuantizeArgs& args) {
  const Scratch scratch(cpu().quantize->scratch(args) * args.feedback.threads);
  args.scratch = scratch.data;
  EXPECT(cpu().quantize->quantize(args), "finite");
}

static std::vector<float> decode(PacketView view, const QuantizeArgs& args) {
  view.codec = args.codec.codec;
  view.bits = args.codec.bits;
  view.value_dtype = F32;
  view.weight = 1;
  view.numel = view.k = args.feedback.numel;
  view.bucket = args.codec.bucket;
  view.seed = 7;
  view.round = 3;
  view.scales = args.scales;
  view.codes = args.codes;
  view.scale_stride = args.codec.scale_stride;
  view.code_stride = args.codec.code_stride;
  std::vector<float> d(size_t(view.numel), NAN);
  const int64_t starts[] = {0, view.numel};
  const int dtype = F32;
  void* out = d.data();
  DecodeArgs x = {};
  x.numel = view.numel;
  x.packets = 1;
  x.views = &view;
  x.layers = 1;
  x.starts = starts;
  x.dtype = &dtype;
  x.out = &out;
  x.threads = args.feedback.threads;
  cpu().decode->dense(x);
  return d;
}

static QuantizeArgs arguments(const Update& u, int codec, int64_t block, int bits) {
  QuantizeArgs args = {};
  args.feedback = u.args;
  args.codec.codec = codec;
  args.codec.bits = bits;
  args.codec.bucket = block;
  args.codec.scale_dtype = F32;
  args.codec.code_stride = block * bits / 8;
  args.codec.rounding = philox_stream(7, 3, STREAM_ROUNDING, 5);
  args.codec.rotation = philox_stream(7, 3, STREAM_ROTATION, 0);
  args.check = true;
  return args;
}

static void rotated(int64_t numel, int64_t block, int bits, int threads) {
  const Update u(numel, int(numel % 4), threads);
  Bytes scales(4 * ((numel + block - 1) / block), 1);
  Bytes codes((code_count(numel, block) * bits + 7) / 8, 3);
  QuantizeArgs args = arguments(u, CODEC_ROTATED, block, bits);
  args.codec.scale_stride = 4;
  args.scales = scales.data;
  args.codes = codes.data;
  encode(args);
  u.check(decode(PacketView{}, args));
}

static void thc(int64_t numel, int64_t block, int bits, int threads) {
  const Update u(numel, int(numel % 4), threads);
  const int64_t blocks = (numel + block - 1) / block, count = code_count(numel, block);
  std::vector<double> squares(size_t(blocks), NAN);
  const Scratch room(6 * block * threads);
  EXPECT(cpu().lut_add->norms(BlockNormArgs{u.args, block, squares.data(), room.data}), "finite");
  Bytes norm(4 + 4 * blocks, 2), codes((count * bits + 7) / 8, 1), codebook(2 << bits, 1);
  const float clip = 2;
  std::memcpy(norm.data, &clip, 4);
  std::vector<float> norms;
  for (const double square : squares) norms.push_back(float(std::sqrt(square)));
  std::memcpy(norm.data + 4, norms.data(), 4 * norms.size());
  std::vector<uint16_t> table;
  for (int k = 0; k < 1 << bits; ++k) table.push_back(uint16_t(2 * k));
  std::memcpy(codebook.data, table.data(), 2 * table.size());
  const ThcArgs extra{norms.data(), false, numel, clip, table.data()};
  QuantizeArgs args = arguments(u, CODEC_THC, block, bits);
  args.codec.extra = &extra;
  args.codes = codes.data;
  encode(args);
  PacketView view = {};
  view.codebook = codebook.data;
  view.norm = norm.data;
  const std::vector<float> d = decode(view, args);
  u.check(d);

  const int n = 3, g = table.back();  // three times the same packet
  const uint8_t* packets[n] = {codes.data, codes.data, codes.data};
  std::vector<uint8_t> tables(16 * n, 0);
  for (size_t i = 0; i < n; ++i)
    for (size_t k = 0; k < table.size(); ++k) tables[16 * i + k] = uint8_t(table[k]);
  for (const int lane : {1, 2, 4}) {
    Bytes sums(count * lane, 1);
    cpu().lut_add->add(
        LutAddArgs{count, bits, n, packets, tables.data(), lane, sums.data, threads});
    std::vector<float> mean(size_t(numel), NAN);
    cpu().lut_add->decode(LutDecodeArgs{numel, block, lane, sums.data, n * g, n, norms.data(),
                                        false, clip, g, args.codec.rotation, mean.data(),
                                        threads});
    for (size_t i = 0; i < mean.size(); ++i)
      EXPECT(std::fabs(mean[i] - d[i]) <= 1e-5f, "coordinate %zu of %lld", i, (long long)numel);
  }
}

int main() {
  for (const int threads : {1, 3})
    for (const int64_t numel : {1, 2, 3, 5, 15, 17, 100, 255, 256, 257, 1023, 1025, 2049, 9000})
      for (const int64_t block : {256, 512, 1024, 2048, 4096}) {
        for (int bits = 1; bits <= ROTATION_BITS; ++bits) rotated(numel, block, bits, threads);
        thc(numel, block, 2, threads);
        thc(numel, block, 4, threads);
      }
  std::printf("ok %s\n", cpu().name);
  return 0;
}
