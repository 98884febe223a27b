// Products with quantized weights of ones on exactly sized heap buffers at odd offsets: a read or
// write one byte outside is an error of the address sanitizer.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "api.h"
#include "expect.h"
#include "odd_bytes.h"

using namespace flcore;

// 1 as float32, float16 and bfloat16.
static uint32_t one_of(int dtype) {
  return dtype == F32 ? 0x3f800000u : dtype == F16 ? 0x3c00u : 0x3f80u;
}

static void fill(uint8_t* to, int64_t count, int dtype, uint32_t bits) {
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(to + i * dtype_bytes(dtype), &bits, size_t(dtype_bytes(dtype)));
}

static float value(const uint8_t* from, int64_t i, int dtype) {
  uint32_t bits = 0;
  std::memcpy(&bits, from + i * dtype_bytes(dtype), size_t(dtype_bytes(dtype)));
  if (dtype == F16) {  // whole numbers and what lies between them, all normal
    const int exponent = int(bits >> 10 & 31) - 15;
    return std::ldexp(1.0f + float(bits & 1023) / 1024.0f, exponent);
  }
  if (dtype == BF16) bits <<= 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

struct Weight {
  Weight(int64_t n, int64_t k, int bits, int kind, int64_t group)
      : blocks((n + 15) / 16),
        groups(group < k ? (k + group - 1) / group : 1),
        codes(blocks * ((k + 31) / 32) * 64 * bits),
        scales(4 * blocks * groups * 16),
        zeros(4 * blocks * groups * 16),
        table(16) {
    // the code of 1 in every place: one more than the middle, or 0x38 in FP8
    const int byte = kind == QW_E4M3 ? 0x38
                     : bits == 8     ? 0x81
                     : bits == 4     ? 0x99
                     : bits == 2     ? 0xff
                                     : 0x55;
    std::memset(codes.data, byte, size_t(blocks * ((k + 31) / 32) * 64 * bits));
    if (bits == 3)  // two vectors of low bits, one of high bits
      for (int64_t c = 0; c < blocks * ((k + 31) / 32); ++c)
        std::memset(codes.data + c * 192 + 128, 0xff, 64);
    std::memset(zeros.data, 0, size_t(4 * blocks * groups * 16));
    for (int64_t i = 0; i < blocks * groups * 16; ++i) {
      const float s = (i / (groups * 16)) * 16 + i % 16 < n ? 1.0f : 0.0f;
      std::memcpy(scales.data + 4 * i, &s, 4);
    }
    for (int q = 0; q < 16; ++q) table[size_t(q)] = float(q - 8);
    w = QWeight{n,
                k,
                bits,
                kind,
                group,
                codes.data,
                scales.data,
                F32,
                kind == QW_FLOAT_ZERO ? zeros.data : nullptr,
                kind == QW_TABLE ? table.data() : nullptr};
  }
  int64_t blocks, groups;
  Bytes codes, scales, zeros;
  std::vector<float> table;  // the one array that is aligned
  QWeight w;
};

template <class Fns>
static void product(const Fns& fns, const QWeight& w, int64_t m, int dtype, bool gradient,
                    int64_t act_block, int threads) {
  const int64_t inputs = gradient ? w.n : w.k, outputs = gradient ? w.k : w.n;
  const int64_t item = dtype_bytes(dtype);
  Bytes x(m * inputs * item), y(m * outputs * item);
  fill(x.data, m * inputs, dtype, one_of(dtype));
  fill(y.data, m * outputs, dtype, 0xffffffffu);
  QMatmulArgs args = {};
  args.w = w;
  args.m = m;
  args.x = x.data;
  args.y = y.data;
  args.x_dtype = args.y_dtype = dtype;
  args.x_stride = inputs;
  args.y_stride = outputs;
  args.act_block = act_block;
  args.threads = threads;
  void* scratch = std::aligned_alloc(64, size_t((fns.scratch(args) + 63) / 64 * 64 + 64));
  args.scratch = scratch;
  fns.run(args);
  std::free(scratch);
  for (int64_t i = 0; i < m * outputs; ++i) {
    const float got = value(y.data, i, dtype), slack = dtype == F32 ? 1e-5f : 0.01f;
    EXPECT(std::fabs(got - float(inputs)) <= slack * float(inputs),
           "%d bits, kind %d, %d x %d, %d rows, dtype %d: %g", w.bits, w.kind, int(w.n), int(w.k),
           int(m), dtype, double(got));
  }
}

static void all(int64_t n, int64_t k, int bits, int kind, int64_t group, int threads) {
  const Weight weight(n, k, bits, kind, group);
  for (int64_t m : {1, 3, 8, 13, 70})
    for (int dtype : {int(F32), int(F16), int(BF16)}) {
      product(*cpu().qmatmul, weight.w, m, dtype, false, 0, threads);
      product(*cpu().qmatmul_dx, weight.w, m, dtype, true, 0, threads);
      if (kind == QW_INT || kind == QW_FLOAT_ZERO)
        product(*cpu().qmatmul_int8, weight.w, m, dtype, false, group < k ? group : 0, threads);
    }
}

int main() {
  for (int64_t n : {1, 17, 48})
    for (int64_t k : {1, 33, 130, 300}) {
      const int threads = n == 17 ? 3 : 1;
      const int64_t group = k > 128 ? 64 : k;
      for (int bits : {2, 3, 4, 8}) {
        all(n, k, bits, QW_INT, group, threads);
        if (bits % 4 == 0) all(n, k, bits, QW_FLOAT_ZERO, k > 16 ? 16 : k, threads);
      }
      all(n, k, 4, QW_TABLE, group, threads);
      all(n, k, 8, QW_E4M3, group, threads);
    }
  std::printf("ok %s\n", cpu().name);
  return 0;
}
