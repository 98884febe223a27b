// Projected gradients with exactly sized heap buffers at odd offsets: a read or write one byte
// outside is an error of the address sanitizer.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "expect.h"

using namespace flcore;

// A buffer that ends exactly where its allocation ends, at an unaligned address.
struct Buffer {
  Buffer(int64_t count, int dtype, int shift)
      : dtype(dtype), memory(new char[size_t(count * dtype_bytes(dtype) + shift + 1)]) {
    data = memory.get() + 1 + shift;
  }
  // 1 or -1: the numbers that are exact in every dtype
  void set(int64_t i, bool negative) {
    const double d = negative ? -1 : 1;
    const float f = float(d);
    const uint16_t half = uint16_t((dtype == F16 ? 0x3c00 : 0x3f80) | (negative ? 0x8000 : 0));
    const void* from = dtype == F64   ? static_cast<const void*>(&d)
                       : dtype == F32 ? static_cast<const void*>(&f)
                                      : static_cast<const void*>(&half);
    std::memcpy(data + i * dtype_bytes(dtype), from, size_t(dtype_bytes(dtype)));
  }
  int dtype;
  std::unique_ptr<char[]> memory;
  char* data;
};

static void run(int dtype, int shift, bool global, bool parallel) {
  const std::vector<int64_t> numel = {0, 2, 15, 16, 17, 4095, 4096, 4097, 3 * 4096 + 5};
  const int64_t layers = int64_t(numel.size());
  const std::vector<int> dtypes(size_t(layers), dtype);
  std::vector<std::unique_ptr<Buffer>> keep;
  std::vector<const void*> weight;
  std::vector<void*> grad;
  int64_t tiles = 0;
  for (int64_t count : numel) {
    keep.emplace_back(new Buffer(count, dtype, shift));
    Buffer& w = *keep.back();
    keep.emplace_back(new Buffer(count, dtype, shift));
    Buffer& g = *keep.back();
    for (int64_t i = 0; i < count; ++i) {
      w.set(i, false);
      g.set(i, !parallel && i % 2);  // along the weights, or for even counts across them
    }
    weight.push_back(w.data);
    grad.push_back(g.data);
    tiles += (count + PERP_TILE - 1) / PERP_TILE;
  }
  std::vector<int64_t> first_tile(size_t(layers + 1));
  std::vector<double> scratch(size_t(3 * tiles)), sums(size_t(3 * layers)), rest = sums;
  std::vector<PerpFactors> factors(size_t(layers + 1));
  PerpGradArgs args{PERP_SUMS, layers,      numel.data(),   dtypes.data(),     weight.data(),
                    grad.data(), global,    true,           1e-30,             1e-6,
                    sums.data(), rest.data(), factors.data(), first_tile.data(), scratch.data(), 2};
  cpu().perp_grad->perp_grad(args);
  for (int64_t l = 0; l < layers; ++l) {
    const double n = double(numel[size_t(l)]), odd = double(numel[size_t(l)] % 2);
    EXPECT(sums[size_t(3 * l)] == n && sums[size_t(3 * l + 1)] == (parallel ? n : odd) &&
               sums[size_t(3 * l + 2)] == n,
           "sums of layer %d, dtype %d", int(l), dtype);
  }
  args.step = PERP_REST;
  EXPECT(cpu().perp_grad->perp_grad(args) == parallel, "what is left, dtype %d", dtype);
  args.step = parallel ? PERP_APPLY : PERP_PROJECT;
  cpu().perp_grad->perp_grad(args);
  for (int64_t l = 0; l < layers; ++l) {
    if (!parallel) continue;
    for (int64_t b = 0; b < numel[size_t(l)] * dtype_bytes(dtype); ++b)
      EXPECT(static_cast<char*>(grad[size_t(l)])[b] == 0, "layer %d, dtype %d", int(l), dtype);
  }
}

int main() {
  for (int dtype = 0; dtype < DTYPE_COUNT; ++dtype)
    for (int shift : {0, 1, 2})
      for (bool global : {false, true})
        for (bool parallel : {false, true}) run(dtype, shift, global, parallel);
  std::printf("ok %s\n", cpu().name);
  return 0;
}
