// select and gram with exactly sized heap buffers at odd offsets: a read or write one byte outside
// is an error of the address sanitizer. Rows hold small integers, so that every result is known.
#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "exact.h"
#include "expect.h"

using namespace flcore;

// Memory that ends where its content ends.
struct Block {
  explicit Block(int64_t bytes, int shift = 0)
      : memory(new char[size_t(bytes + shift) + !bytes]), data(memory.get() + shift) {
    std::memset(memory.get(), 0, size_t(bytes + shift));
  }
  std::unique_ptr<char[]> memory;
  char* data;
};

// The value v, 0 <= v < 2048 (128 for bfloat16), in the storage type.
static void put(char* to, int dtype, int v) {
  const double d = v;
  const float f = float(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint16_t half = uint16_t(bits >> 16);
  if (dtype == F16) half = v ? uint16_t(((bits >> 13) & 0x3ff) | (((bits >> 23) - 112) << 10)) : 0;
  if (dtype == F64)
    std::memcpy(to, &d, 8);
  else if (dtype == F32)
    std::memcpy(to, &f, 4);
  else
    std::memcpy(to, &half, 2);
}

struct Rows {
  Rows(int64_t n, const std::vector<int64_t>& numel, int dtype, int shift)
      : dtypes(numel.size(), dtype) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t size : numel) {
        keep.emplace_back(size * dtype_bytes(dtype), shift);
        for (int64_t j = 0; j < size; ++j)  // a permutation of 0 .. n - 1 in each coordinate
          put(keep.back().data + j * dtype_bytes(dtype), dtype, int((7 * i + j) % n));
        rows.push_back(keep.back().data);
      }
  }
  std::vector<int> dtypes;
  std::vector<Block> keep;
  std::vector<const void*> rows;
};

static char* aligned(Block& block) {
  return block.data + (64 - reinterpret_cast<uintptr_t>(block.data) % 64) % 64;
}

static void statistics(int64_t n, const std::vector<int64_t>& numel, int dtype, int shift,
                       bool mix) {
  const Rows x(n, numel, dtype, shift);
  const int64_t layers = int64_t(numel.size());
  std::vector<int64_t> starts, index, first_tile(size_t(layers + 1));
  for (int64_t i = 0; i <= n; ++i) starts.push_back(i);
  for (int64_t i = 0; i < n; ++i) index.push_back(n - 1 - i);
  const std::vector<double> ones(size_t(n), 1.0);
  for (int op = 0; op < SELECT_OP_COUNT; ++op) {
    std::vector<Block> out;
    std::vector<void*> to;
    for (int64_t size : numel) {
      out.emplace_back(size * dtype_bytes(dtype), shift);
      to.push_back(out.back().data);
    }
    SelectArgs a{};
    a.n = a.count = n;
    a.layers = layers;
    a.numel = numel.data();
    a.dtype = x.dtypes.data();
    a.rows = x.rows.data();
    a.op = op;
    a.median = MEDIAN_LOWER;
    a.f = (n - 1) / 2;
    a.keep = 1;
    a.mix_starts = mix ? starts.data() : nullptr;
    a.mix_rows = index.data();
    a.mix_values = ones.data();
    a.out = to.data();
    a.threads = 2;
    a.first_tile = first_tile.data();
    Block scratch(2 * cpu().select->scratch(a) + 64);
    a.scratch = aligned(scratch);
    EXPECT(cpu().select->select(a) == 0, "finite rows were flagged");
    if (n % 2 == 0 && op != SELECT_MEDIAN) continue;  // trims to the two middle values
    char want[8];
    put(want, dtype, int((n - 1) / 2));
    for (size_t l = 0; l < numel.size(); ++l)
      for (int64_t j = 0; j < numel[l]; ++j)
        EXPECT(!std::memcmp(out[l].data + j * dtype_bytes(dtype), want, size_t(dtype_bytes(dtype))),
               "op %d dtype %d n %d", op, dtype, int(n));
  }
}

static void distances(int64_t n, const std::vector<int64_t>& numel, int dtype, int shift, int kind,
                      bool wide) {
  const Rows x(n, numel, dtype, shift);
  const int64_t layers = int64_t(numel.size()), entries = gram_entries(n, kind);
  std::vector<int64_t> starts{0}, first_chunk(size_t(layers + 1));
  for (int64_t size : numel) starts.push_back(starts.back() + size);
  std::vector<int64_t> sums(size_t(layers * entries * gram_words(wide)));
  GramArgs a{};
  a.n = n;
  a.layers = a.segments = layers;
  a.starts = a.segment_starts = starts.data();
  a.dtype = x.dtypes.data();
  a.rows = x.rows.data();
  a.kind = kind;
  a.wide = wide;
  a.sums = sums.data();
  a.threads = 2;
  a.first_chunk = first_chunk.data();
  Block scratch(2 * cpu().gram->scratch(a) + 64);
  a.scratch = aligned(scratch);
  cpu().gram->gram(a);
  const ExactForm form = gram_form(wide);
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t* at = sums.data() + l * entries * form.words();
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = kind == GRAM_NORMS ? i : 0; k <= i; ++k, at += form.words()) {
        double want = 0;
        for (int64_t j = 0; j < numel[size_t(l)]; ++j) {
          const double p = double((7 * i + j) % n), q = double((7 * k + j) % n);
          want += i == k || kind == GRAM_PRODUCTS ? p * q : (p - q) * (p - q);
        }
        EXPECT(exact_value(at, form, false) == want, "kind %d dtype %d rows %d %d", kind, dtype,
               int(i), int(k));
      }
  }
}

static void exact_sums() {
  const ExactForm form{GRAM_UNIT_F64, GRAM_DIGITS_F64};
  const double terms[] = {1e300, 1.0, -1e300, 0x1p-1074, 3.0, -0x1p-1074, -0.0, 0x1p-60};
  std::vector<int64_t> sum(size_t(form.words()));
  for (double t : terms) exact_add(sum.data(), form, t);
  EXPECT(exact_value(sum.data(), form, true) == 4.0, "rounds once, to the nearest");
  exact_add(sum.data(), form, -5.0);
  EXPECT(exact_value(sum.data(), form, true) == -1.0 + 0x1p-60, "negative sums");
}

int main() {
  const std::vector<int64_t> numel = {0, 1, 17, 4097, 5, 1023};
  for (int dtype = 0; dtype < DTYPE_COUNT; ++dtype)
    for (int shift : {0, 1, 3}) {
      for (int64_t n : {1, 5, 32, 33, 65, 101})  // no multiples of 7
        for (bool mix : {false, true}) statistics(n, numel, dtype, shift, mix);
      for (int64_t n : {1, 3, 5})
        for (int kind = 0; kind < GRAM_KIND_COUNT; ++kind)
          for (bool wide : {false, true})
            distances(n, numel, dtype, shift, kind, wide || dtype == F64);
    }
  statistics(129, {40}, F32, 1, false);
  exact_sums();
  std::printf("ok %s\n", cpu().name);
  return 0;
}
