// combine and the probes with exactly sized heap buffers at odd offsets: a read or write one byte
// outside is an error of the address sanitizer.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "api.h"
#include "expect.h"

using namespace flcore;

// `count` values of a dtype, ending exactly where the allocation ends, at an unaligned address.
struct Exact {
  Exact(int64_t count, int dtype, int shift)
      : bytes(size_t(count * dtype_bytes(dtype) + shift)), memory(new char[bytes ? bytes : 1]) {
    std::memset(memory.get(), 0, bytes);
    data = memory.get() + shift;
  }
  size_t bytes;
  std::unique_ptr<char[]> memory;
  void* data;
};

static void sums(int dtype, int accumulate, int64_t n, std::vector<int64_t> numel, int shift) {
  std::mt19937 random(unsigned(n * 31 + shift));
  const int64_t layers = int64_t(numel.size());
  std::vector<std::unique_ptr<Exact>> keep;
  std::vector<const void*> rows;
  std::vector<void*> out, state;
  std::vector<int> dtypes(size_t(layers), dtype);
  for (int64_t i = 0; i < n * layers; ++i) {
    keep.emplace_back(new Exact(numel[size_t(i % layers)], dtype, shift));
    char* bytes = static_cast<char*>(keep.back()->data);
    for (int64_t j = 0; j < numel[size_t(i % layers)]; ++j) {  // 1.0 in every dtype, now and then 0
      const bool one = random() % 4 != 0;
      const double d = one;
      const float f = one;
      const uint16_t half = one ? (dtype == F16 ? 0x3c00 : 0x3f80) : 0;
      const int64_t size = dtype_bytes(dtype);
      std::memcpy(bytes + j * size,
                  dtype == F64   ? static_cast<const void*>(&d)
                  : dtype == F32 ? static_cast<const void*>(&f)
                                 : static_cast<const void*>(&half),
                  size_t(size));
    }
    rows.push_back(bytes);
  }
  const bool wide = accumulate != ACC_F32 || dtype == F64;
  for (int64_t l = 0; l < layers; ++l) {
    keep.emplace_back(new Exact(numel[size_t(l)], dtype, shift));
    out.push_back(keep.back()->data);
    const int64_t bins = accumulate == ACC_REPRODUCIBLE ? 3 : 1;
    keep.emplace_back(new Exact(numel[size_t(l)] * bins, wide ? F64 : F32, 0));
    state.push_back(keep.back()->data);
  }
  const std::vector<double> weights(size_t(n), 0.5);
  std::vector<int64_t> first_tile(size_t(layers + 1));
  CombineArgs args{n,          layers,  numel.data(), dtypes.data(), rows.data(), weights.data(),
                   nullptr,    out.data(), accumulate, 1.0,          2, true,
                   first_tile.data()};
  EXPECT(cpu().combine->combine(args) == 0, "dtype %d accumulate %d", dtype, accumulate);
  args.state = state.data();
  args.out = nullptr;
  EXPECT(cpu().combine->combine(args) == 0, "streaming");
  const std::vector<void*> direct = out;
  std::vector<std::unique_ptr<Exact>> second;
  std::vector<void*> finished;
  for (int64_t l = 0; l < layers; ++l) {
    second.emplace_back(new Exact(numel[size_t(l)], dtype, shift));
    finished.push_back(second.back()->data);
  }
  args.n = 0;
  args.out = finished.data();
  EXPECT(cpu().combine->combine(args) == 0, "finish");
  for (int64_t l = 0; l < layers; ++l)
    EXPECT(!std::memcmp(direct[size_t(l)], finished[size_t(l)],
                        size_t(numel[size_t(l)] * dtype_bytes(dtype))),
           "streaming and direct sums differ, dtype %d accumulate %d", dtype, accumulate);
  std::vector<int32_t> flags(size_t(n), 7);
  const FiniteArgs finite{n, layers, numel.data(), dtypes.data(), rows.data(), flags.data(), 2,
                          first_tile.data()};
  cpu().combine->nonfinite(finite);
  for (int32_t f : flags) EXPECT(f == 0, "a finite row was flagged");
}

int main() {
  for (int dtype = 0; dtype < DTYPE_COUNT; ++dtype)
    for (int accumulate = 0; accumulate < ACCUMULATE_COUNT; ++accumulate)
      for (int64_t n : {0, 1, 3, 9})
        for (int shift : {0, 1, 3})
          sums(dtype, accumulate, n, {0, 1, 17, 4097, 5, 1023, 8200}, shift);
  for (int64_t bytes : {0, 1, 63, 70000}) {
    Exact a(bytes, F16, 0), b(bytes, F16, 1);
    cpu().probe->copy(b.data, a.data, 2 * bytes, 2);
    EXPECT(cpu().probe->read(b.data, 2 * bytes, 2) == 0, "zeros add up to zero");
  }
  std::printf("ok %s\n", cpu().name);
  return 0;
}
