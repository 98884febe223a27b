// Bags of table rows with exactly sized heap buffers at odd offsets: a read or write one byte
// outside is an error of the address sanitizer.
#include <cstdio>
#include <cstring>
#include <vector>

#include "api.h"
#include "expect.h"
#include "odd_bytes.h"

using namespace flcore;

static int64_t row_bytes(int64_t k, int bits) {
  return bits == 3 ? (k + 3) / 4 + (k + 7) / 8 : (k * bits + 7) / 8;
}

// Every code is 1: fields of 2, 4 or 8 bits, and no bit of the high plane of 3 bits.
static void fill_row(uint8_t* row, int64_t k, int bits) {
  const int low = bits == 3 ? 2 : bits;
  std::memset(row, 0, size_t(row_bytes(k, bits)));
  for (int64_t i = 0; i < k; ++i) row[i * low / 8] |= uint8_t(1 << (i * low % 8));
}

static void run(int64_t k, int bits, int kind, int64_t group, int out_dtype, int threads) {
  const int64_t n = 5, groups = (k + group - 1) / group, stride = row_bytes(k, bits);
  const bool has_zeros = kind == QW_FLOAT_ZERO || (kind == QW_INT && k % 2);
  Bytes codes(n * stride), scales(4 * n * groups), zeros(4 * n * groups), table(4 * 16);
  for (int64_t r = 0; r < n; ++r) fill_row(codes.data + r * stride, k, bits);
  const float one = 1.0f, level = kind == QW_E4M3 ? 0x1p-9f : kind == QW_E5M2 ? 0x1p-16f : 3.0f;
  for (int64_t i = 0; i < n * groups; ++i) {
    std::memcpy(scales.data + 4 * i, &one, 4);
    if (kind == QW_FLOAT_ZERO)
      std::memcpy(zeros.data + 4 * i, &one, 4);
    else
      zeros.data[i] = 4;
  }
  for (int i = 0; i < 16; ++i) std::memcpy(table.data + 4 * i, &level, 4);
  const float half = float(1 << (bits - 1));
  const float w = kind == QW_INT          ? 1 - (has_zeros ? 4 : half)
                  : kind == QW_FLOAT_ZERO ? 1 - half + 1
                                          : level;
  const std::vector<int64_t> index = {4, 0, 2, 2, 1}, starts = {0, 0, 1, 5};
  const std::vector<float> coefficients = {1, 2, 1, 1, 2};
  const int64_t bytes = dtype_bytes(out_dtype);
  Bytes out(3 * k * bytes);
  QEmbeddingArgs args{k,
                      bits,
                      kind,
                      group,
                      codes.data,
                      stride,
                      scales.data,
                      F32,
                      has_zeros ? zeros.data : nullptr,
                      kind == QW_TABLE ? reinterpret_cast<const float*>(table.data) : nullptr,
                      3,
                      index.data(),
                      starts.data(),
                      coefficients.data(),
                      false,
                      1,
                      out.data,
                      out_dtype,
                      k,
                      nullptr,
                      false,
                      threads};
  cpu().qembedding->run(args);
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t i = 0; i < k; ++i) {
      const float want = b == 0 ? 0 : b == 1 ? w : 4 * w;  // the last entry is padding
      uint8_t* at = out.data + (b * k + i) * bytes;
      float got;
      if (out_dtype == F32) {
        std::memcpy(&got, at, 4);
      } else {  // bfloat16: the numbers here are exact in it
        uint32_t bits32 = uint32_t(at[0] | at[1] << 8) << 16;
        std::memcpy(&got, &bits32, 4);
      }
      EXPECT(got == want, "k %d bits %d kind %d bag %d column %d", int(k), bits, kind, int(b),
             int(i));
    }
}

// Rows of floats added to some rows of the result: the gradient.
static void scatter(int64_t k) {
  Bytes rows(2 * 2 * k), out(4 * 3 * k);
  for (int64_t i = 0; i < 2 * k; ++i) {
    const uint16_t one = 0x3c00;
    std::memcpy(rows.data + 2 * i, &one, 2);
  }
  std::memset(out.data, 0, size_t(12 * k));
  const std::vector<int64_t> index = {0, 1, 1}, starts = {0, 2, 3}, to = {2, 0};
  QEmbeddingArgs args{k,      0,       QE_FLOAT, k, rows.data,  2 * k, nullptr, F16,
                      nullptr, nullptr, 2, index.data(), starts.data(), nullptr, false, -1,
                      out.data, F32,   k, to.data(), true, 2};
  cpu().qembedding->run(args);
  for (int64_t r = 0; r < 3; ++r)
    for (int64_t i = 0; i < k; ++i) {
      float got;
      std::memcpy(&got, out.data + 4 * (r * k + i), 4);
      EXPECT(got == (r == 2 ? 2 : r == 0 ? 1 : 0), "k %d row %d", int(k), int(r));
    }
}

int main() {
  for (int64_t k : {1, 7, 15, 16, 17, 33, 100, 128, 1023, 1025, 2100}) {
    for (int threads : {1, 3}) {
      const int64_t groups[] = {16, 48, k < 16 ? 16 : k};
      for (int64_t group : groups) {
        for (int bits : {2, 3, 4, 8}) {
          run(k, bits, QW_INT, group < k ? group : k, F32, threads);
          run(k, bits, QW_FLOAT_ZERO, group < k ? group : k, BF16, threads);
        }
        run(k, 4, QW_TABLE, group < k ? group : k, F32, threads);
        run(k, 8, QW_E4M3, group < k ? group : k, BF16, threads);
        run(k, 8, QW_E5M2, group < k ? group : k, F32, threads);
      }
    }
    scatter(k);
  }
  std::printf("ok %s\n", cpu().name);
  return 0;
}
