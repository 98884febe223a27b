// Sums by a matrix, rows of int8, and server steps with exactly sized heap buffers at odd offsets: a
// read or write one byte outside is an error of the address sanitizer.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "api.h"
#include "expect.h"

using namespace flcore;

static std::mt19937 generator(7);

// One buffer a layer, each ending exactly where its allocation ends, `shift` bytes off alignment.
struct Layers {
  Layers(const std::vector<int64_t>& numel, int dtype, int shift) {
    for (int64_t count : numel) {
      const size_t bytes = size_t(count * dtype_bytes(dtype) + shift);
      memory.emplace_back(new char[bytes ? bytes : 1]);
      char* data = memory.back().get() + shift;
      for (int64_t j = 0; j < count; ++j) {  // 0 or 1 in every dtype
        const bool one = generator() % 4 != 0;
        const double d = one;
        const float f = one;
        const uint16_t half = one ? (dtype == F16 ? 0x3c00 : 0x3f80) : 0;
        const int8_t small = one;
        const void* from = dtype == F64   ? static_cast<const void*>(&d)
                           : dtype == F32 ? static_cast<const void*>(&f)
                           : dtype == I8  ? static_cast<const void*>(&small)
                                          : static_cast<const void*>(&half);
        std::memcpy(data + j * dtype_bytes(dtype), from, size_t(dtype_bytes(dtype)));
      }
      at.push_back(data);
    }
  }
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<void*> at;
};

struct Problem {
  Problem(std::vector<int64_t> sizes, int row_dtype, int64_t n, int shift)
      : numel(std::move(sizes)), dtype(numel.size(), row_dtype), weights(size_t(n), 0.5),
        first_tile(numel.size() + 1) {
    for (int64_t i = 0; i < n; ++i) {
      keep.emplace_back(new Layers(numel, row_dtype, shift));
      rows.insert(rows.end(), keep.back()->at.begin(), keep.back()->at.end());
    }
  }
  CombineArgs args(int accumulate, const std::vector<int>& out_dtype) {
    CombineArgs a{};
    a.n = int64_t(weights.size());
    a.layers = int64_t(numel.size());
    a.numel = numel.data();
    a.dtype = dtype.data();
    a.rows = rows.data();
    a.weights = weights.data();
    a.accumulate = accumulate;
    a.divisor = 2.0;
    a.threads = 2;
    a.check = true;
    a.first_tile = first_tile.data();
    a.out_dtype = out_dtype.data();
    return a;
  }
  std::vector<int64_t> numel;
  std::vector<int> dtype;
  std::vector<double> weights;
  std::vector<int64_t> first_tile;
  std::vector<std::unique_ptr<Layers>> keep;
  std::vector<const void*> rows;
};

static void steps(int row_dtype, int model_dtype, int accumulate, int kind, bool models, int shift) {
  Problem p({0, 1, 17, 4097, 8200}, row_dtype, 3, shift);
  const size_t layers = p.numel.size();
  const int state = model_dtype == F64 ? F64 : F32;
  const Layers w(p.numel, model_dtype, shift), m(p.numel, state, shift), v(p.numel, state, shift);
  const Layers w2(p.numel, model_dtype, shift), m2(p.numel, state, shift),
      v2(p.numel, state, shift), copy(p.numel, BF16, shift);
  const std::vector<int> model(layers, model_dtype), sums(layers, state);
  const std::vector<uint32_t> tensor(layers, 3);
  const std::vector<const void*> w_in(w.at.begin(), w.at.end()), m_in(m.at.begin(), m.at.end()),
      v_in(v.at.begin(), v.at.end());
  StepArgs a{};
  a.sum = p.args(accumulate, sums);
  a.kind = kind;
  a.models = models;
  a.lr = 0.1;
  a.beta1 = 0.9;
  a.beta2 = 0.99;
  a.tau = 1e-3;
  a.model_dtype = model.data();
  a.model = w_in.data();
  a.m = kind == STEP_SGD ? nullptr : m_in.data();
  a.v = kind > STEP_MOMENTUM ? v_in.data() : nullptr;
  a.new_model = w2.at.data();
  a.new_m = m2.at.data();
  a.new_v = v2.at.data();
  a.copy = shift ? copy.at.data() : nullptr;
  a.copy_dtype = BF16;
  a.noise_std = shift == 1 ? 0.25 : 0.0;
  a.noise = philox_stream(5, 1, 0, 2);
  a.tensor = tensor.data();
  EXPECT(cpu().combine->step(a) == 0, "kind %d rows %d model %d accumulate %d", kind, row_dtype,
         model_dtype, accumulate);
}

static void many(int dtype, int accumulate, int shift) {
  Problem p({0, 1, 17, 4097}, dtype, 9, shift);
  const size_t layers = p.numel.size();
  const std::vector<int64_t> starts = {0, 0, 3, 12}, index = {0, 4, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8};
  const std::vector<double> coefficients(12, 0.25);
  std::vector<std::unique_ptr<Layers>> keep;
  std::vector<void*> out;
  for (int k = 0; k < 3; ++k) {
    keep.emplace_back(new Layers(p.numel, dtype, shift));
    out.insert(out.end(), keep.back()->at.begin(), keep.back()->at.end());
  }
  CombineRowsArgs a{p.args(accumulate, p.dtype), 3, starts.data(), index.data(),
                    coefficients.data(), out.data()};
  a.sums.divisor = 1.0;
  EXPECT(cpu().combine->rows(a) == 0, "dtype %d accumulate %d", dtype, accumulate);
  for (size_t l = 0; l < layers; ++l) {
    const char* bytes = static_cast<const char*>(out[l]);
    for (int64_t j = 0; j < p.numel[l] * dtype_bytes(dtype); ++j)
      EXPECT(bytes[j] == 0, "a line without rows is zero");
  }
}

static void scaled(int accumulate, int shift) {
  Problem p({0, 1, 17, 4097}, I8, 9, shift);
  const std::vector<int> out_dtype(p.numel.size(), F32);
  p.weights.assign(9 * p.numel.size(), 0.5);
  const Layers out(p.numel, F32, shift);
  CombineArgs a = p.args(accumulate, out_dtype);
  a.n = 9;
  a.by_layer = true;
  a.out = out.at.data();
  EXPECT(cpu().combine->combine(a) == 0, "int8 rows, accumulate %d", accumulate);
  std::vector<int32_t> flags(9, 7);
  const FiniteArgs finite{9, a.layers, a.numel, a.dtype, a.rows, flags.data(), 2, a.first_tile};
  cpu().combine->nonfinite(finite);
  for (int32_t f : flags) EXPECT(f == 0, "int8 is always finite");
}

int main() {
  for (int shift : {0, 1, 3}) {
    for (int accumulate = 0; accumulate < ACCUMULATE_COUNT; ++accumulate) {
      for (int dtype = 0; dtype < DTYPE_COUNT; ++dtype) many(dtype, accumulate, shift);
      scaled(accumulate, shift);
      for (int kind = 0; kind < STEP_KIND_COUNT; ++kind)
        for (int rows = 0; rows < ROW_DTYPE_COUNT; ++rows)
          for (int model = 0; model < DTYPE_COUNT; ++model)
            steps(rows, model, accumulate, kind, (kind + shift) % 2 != 0, shift);
    }
  }
  std::printf("ok %s\n", cpu().name);
  return 0;
}
