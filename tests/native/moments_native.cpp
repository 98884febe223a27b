// moments and affine maps with exactly sized heap buffers at odd offsets: a read or write one byte
// outside is an error of the address sanitizer.
#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "expect.h"

using namespace flcore;

// `count` values 1 of a dtype, ending exactly where the allocation ends, at an unaligned address.
struct Ones {
  Ones(int64_t count, int dtype, int shift)
      : memory(new char[size_t(count * dtype_bytes(dtype) + shift + 1)]) {
    data = memory.get() + 1 + shift;
    for (int64_t j = 0; j < count; ++j) {
      const double d = 1;
      const float f = 1;
      const uint16_t half = dtype == F16 ? 0x3c00 : 0x3f80;
      const void* one = dtype == F64   ? static_cast<const void*>(&d)
                        : dtype == F32 ? static_cast<const void*>(&f)
                                       : static_cast<const void*>(&half);
      std::memcpy(data + j * dtype_bytes(dtype), one, size_t(dtype_bytes(dtype)));
    }
  }
  std::unique_ptr<char[]> memory;
  char* data;
};

static void run(int dtype, int shift) {
  const std::vector<int64_t> numel = {0, 1, 15, 16, 17, 4095, 4096, 4097, 3 * 4096 + 5};
  const int64_t n = 2, layers = int64_t(numel.size());
  const int acc_dtype = dtype == F64 ? F64 : F32;
  const std::vector<int> dtypes(size_t(layers), dtype);
  std::vector<std::unique_ptr<Ones>> keep;
  std::vector<const void*> rows;
  std::vector<void*> acc, out;
  const auto make = [&](int64_t count, int type) {
    keep.emplace_back(new Ones(count, type, shift));
    return keep.back()->data;
  };
  int64_t tiles = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t count : numel) rows.push_back(make(count, dtype));
  for (int64_t count : numel) {
    acc.push_back(make(count, acc_dtype));
    out.push_back(make(count, dtype));
    tiles += (count + MOMENT_TILE - 1) / MOMENT_TILE;
  }
  std::vector<int64_t> first_tile(size_t(layers + 1));
  std::vector<double> scratch(size_t(3 * n * tiles)), mean(size_t(n * layers)), m2 = mean;
  MomentsArgs args{n, layers, numel.data(), dtypes.data(), rows.data(), MOMENTS_ROWS, nullptr, 1.0,
                   2.0, mean.data(), m2.data(), first_tile.data(), scratch.data(), 2};
  const auto expect = [&](int64_t row, double want, const char* what) {
    for (int64_t l = 0; l < layers; ++l) {
      const size_t at = size_t(row * layers + l);
      EXPECT(mean[at] == (numel[size_t(l)] ? want : 0) && m2[at] == 0, "%s: layer %d, dtype %d",
             what, int(l), dtype);
    }
  };
  cpu().moments->moments(args);
  expect(0, 1, "rows");
  expect(1, 1, "rows");
  args.n = 1;
  args.acc = acc.data();
  args.of = MOMENTS_ADD;  // acc = 1 + 2 x 1
  cpu().moments->moments(args);
  expect(0, 1, "add");
  args.of = MOMENTS_BLEND;  // 3 + 2 x 1
  cpu().moments->moments(args);
  expect(0, 5, "blend");
  args.row_weight = 0;
  cpu().moments->moments(args);
  expect(0, 3, "scaled accumulator");

  const std::vector<double> scale(size_t(layers), 0.5), shift_by(size_t(layers), -1.5);
  for (double weight : {2.0, 0.0}) {
    const std::vector<const void*> blended(acc.begin(), acc.end());
    const AffineArgs map{layers, numel.data(), dtypes.data(), rows.data(), blended.data(), 1.0,
                         weight, scale.data(), shift_by.data(), out.data(), first_tile.data(), 2};
    EXPECT(!cpu().moments->affine(map), "finite results were flagged, dtype %d", dtype);
    for (int64_t l = 0; l < layers; ++l)  // (3 + 2) / 2 - 1.5 = 1, 3 / 2 - 1.5 = 0
      for (int64_t b = 0; b < numel[size_t(l)] * dtype_bytes(dtype); ++b) {
        const char want = weight ? static_cast<const char*>(rows[size_t(l)])[b] : 0;
        EXPECT(static_cast<char*>(out[size_t(l)])[b] == want, "map: layer %d, dtype %d", int(l),
               dtype);
      }
  }
}

int main() {
  for (int dtype = 0; dtype < DTYPE_COUNT; ++dtype)
    for (int shift : {0, 1, 2}) run(dtype, shift);
  std::printf("ok %s\n", cpu().name);
  return 0;
}
