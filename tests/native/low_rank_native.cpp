// Factors and sketches on exactly sized heap buffers, gradients at odd offsets: a read or write one
// byte outside is an error of the address sanitizer. Matrices of rank one, so that results are known.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "expect.h"
#include "low_rank.h"
#include "sketch.h"

using namespace flcore;

// A float32 layer that begins `shift` bytes off any alignment and ends with its memory.
struct Layer {
  Layer(int64_t n, int64_t m, int shift) : memory(new char[size_t(4 * n * m + shift) + 1]) {
    data = memory.get() + shift;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const float x = float(i % 7 + 1) * float(j % 5 - 2);
        std::memcpy(data + 4 * (i * m + j), &x, 4);
      }
  }
  std::unique_ptr<char[]> memory;
  char* data;
};

struct Update {
  Update(const std::vector<std::pair<int64_t, int64_t>>& shapes, int threads) {
    starts.push_back(0);
    for (const auto& [n, m] : shapes) {
      layers.emplace_back(n, m, int(layers.size()) % 4);
      grads.push_back(layers.back().data);
      starts.push_back(starts.back() + n * m);
      dtype.push_back(F32);
    }
    args = FeedbackArgs{};
    args.numel = starts.back();
    args.layers = int64_t(shapes.size());
    args.starts = starts.data();
    args.dtype = dtype.data();
    args.grads = grads.data();
    args.a = args.b = args.q = 1;
    args.state_dtype = F32;
    args.threads = threads;
  }
  std::vector<Layer> layers;
  std::vector<const void*> grads;
  std::vector<int64_t> starts;
  std::vector<int> dtype;
  FeedbackArgs args;
};

static void factors(int threads, int dtype) {
  const std::vector<std::pair<int64_t, int64_t>> shapes = {{65, 1025}, {1, 3}, {130, 17}, {1, 2049}};
  const std::vector<int64_t> rank = {3, 0, 1, 0};
  std::vector<int64_t> numel, n, m;
  for (const auto& [a, b] : shapes) {
    numel.push_back(a * b);
    n.push_back(a);
    m.push_back(b);
  }
  Update update(shapes, threads);
  const LowRankPlan plan(numel, n, m, rank);
  std::vector<float> e(size_t(plan.numel), 0.0f), e_new(e), start(size_t(plan.q)), next(start);
  for (size_t i = 0; i < start.size(); ++i) start[i] = float(int(i * 37 % 101) - 50);
  const size_t bytes = size_t(dtype_bytes(dtype));
  std::vector<uint8_t> p(bytes * size_t(plan.p)), q(bytes * size_t(plan.q)),
      values(bytes * size_t(plan.values));
  update.args.e = e.data();
  update.args.e_new = e_new.data();
  EXPECT(low_rank(update.args, plan,
                  {start.data(), next.data(), dtype, p.data(), q.data(), values.data()}),
         "not finite");
  double left = 0;
  for (float x : e_new) left = std::max(left, std::fabs(double(x)));
  EXPECT(left < (dtype == F32 ? 1e-4 : 0.3), "left %g", left);  // of rank one: exact but for rounding

  std::vector<float> product(size_t(plan.p)), dense(size_t(plan.values)), back(size_t(plan.q));
  std::vector<float> unit(size_t(plan.q)), columns(size_t(plan.p));
  low_rank_orthonormalise(plan, true, start.data(), unit.data(), threads);
  EXPECT(low_rank_half(update.args, plan, false, unit.data(), product.data(), dense.data()), "P");
  low_rank_orthonormalise(plan, false, product.data(), columns.data(), threads);
  EXPECT(low_rank_half(update.args, plan, true, columns.data(), back.data(), dense.data()), "Q");
  low_rank_residual(plan, columns.data(), back.data(), e_new.data(), e_new.data(), threads);
  for (float x : e_new) EXPECT(std::fabs(x) < 1e-3f, "left %g", double(x));
}

static void sketches(int threads, int64_t rows, int64_t columns) {
  Update update({{1, 1030}, {64, 1100}}, threads);
  const int64_t numel = update.args.numel, parts = 3;
  const SketchHash hash{42, rows, columns};
  std::vector<float> cells(size_t(rows * columns)), more(size_t((parts - 1) * rows * columns));
  EXPECT(cpu().sketch->sketch({&update.args, hash, parts, cells.data(), more.data()}), "finite");
  const SketchTable table{hash, numel, cells.data(), threads};
  std::vector<float> all(static_cast<size_t>(numel));
  cpu().sketch->estimate(table, 0, numel, all.data());
  for (int64_t k : {int64_t(1), int64_t(100), numel}) {
    std::vector<int64_t> index(static_cast<size_t>(k));
    std::vector<float> values(static_cast<size_t>(k));
    sketch_top_k(table, k, index.data(), values.data());
    for (size_t i = 0; i < index.size(); ++i) {
      EXPECT(i == 0 || index[i] > index[i - 1], "order");
      EXPECT(values[i] == all[size_t(index[i])], "value");
    }
    std::vector<float> other(cells);
    cpu().sketch->scatter(hash, index.data(), values.data(), k, other.data(), threads);
    cpu().sketch->scatter(hash, index.data(), nullptr, k, other.data(), threads);
    if (k == numel)
      for (float x : other) EXPECT(x == 0 || columns > numel, "cell %g", double(x));
  }
}

int main() {
  for (int threads : {1, 3}) {
    factors(threads, F32);
    factors(threads, BF16);
    for (int64_t rows : {1, 3, 9}) sketches(threads, rows, 37);
    sketches(threads, 5, 20000);
  }
  std::printf("ok %s\n", cpu().name);
  return 0;
}
