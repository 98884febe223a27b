// Votes, order statistics, Gram matrices, sums and steps from packets, with exactly sized heap
// buffers at odd offsets: a read or write one byte outside is an error of the address sanitizer.
// Packets hold whole numbers, so that every result is known.
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
  template <class T = uint8_t>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  std::unique_ptr<char[]> memory;
  char* data;
};

static char* aligned(Block& block) {
  return block.data + (64 - reinterpret_cast<uintptr_t>(block.data) % 64) % 64;
}

// ---- votes -------------------------------------------------------------------------------------

static bool negative(int64_t i, int64_t j) { return (i * 31 + j * 7 + (i * j) % 5) % 3 == 0; }

static void votes(int64_t n, int64_t numel, int64_t bucket, int shift) {
  std::vector<Block> keep;
  std::vector<VoteRow> rows;
  const int64_t whole = numel / bucket, rest = numel % bucket, stride = (bucket + 7) / 8;
  for (int64_t i = 0; i < n; ++i) {
    keep.emplace_back(whole * stride + (rest + 7) / 8, shift);
    uint8_t* bits = keep.back().as();
    for (int64_t j = 0; j < numel; ++j) {
      const int64_t at = j % bucket;
      if (negative(i, j)) bits[j / bucket * stride + at / 8] |= uint8_t(1 << (at % 8));
    }
    rows.push_back({bits, bucket, double(i % 4 + 1)});
  }
  Block scratch(2 * cpu().vote->scratch(n) + 64);
  for (bool weighted : {false, true})
    for (int form = 0; form < VOTE_FORM_COUNT; ++form) {
      Block out(form == VOTE_BITS ? (numel + 7) / 8 : 4 * numel, shift);
      cpu().vote->vote({n, numel, rows.data(), weighted, form, out.data, 2, aligned(scratch)});
      for (int64_t j = 0; j < numel; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) {
          const double w = weighted || form == VOTE_SUM ? rows[size_t(i)].weight : 1;
          sum += negative(i, j) ? -w : w;
        }
        if (form == VOTE_BITS) {
          EXPECT(((out.as()[j / 8] >> (j % 8)) & 1) == (sum < 0), "bit %d", int(j));
          continue;
        }
        float got;
        std::memcpy(&got, out.data + 4 * j, 4);
        const double sign = sum < 0 ? -1 : sum > 0 ? 1 : 0;
        EXPECT(got == (form == VOTE_SUM ? sum : sign), "n %d coordinate %d: %g", int(n), int(j),
               double(got));
      }
      if (form == VOTE_BITS && numel % 8)
        EXPECT(out.as()[numel / 8] >> (numel % 8) == 0, "bits beyond the last coordinate");
    }
}

// ---- packets of whole numbers ------------------------------------------------------------------

// Packet i at coordinate j; those of odd i are sparse and hold every third coordinate.
static float value(int64_t i, int64_t j) {
  if (i % 2 && j % 3) return 0;
  return float((5 * i + j) % 7) - 3;
}

struct Packets {
  Packets(int64_t n, int64_t numel, int64_t bucket, int shift) {
    for (int64_t i = 0; i < n; ++i)
      i % 2 ? sparse(i, numel, shift) : uniform(i, numel, bucket, shift);
  }
  // 4 bits, unit 1: code = value + 7
  void uniform(int64_t i, int64_t numel, int64_t bucket, int shift) {
    const int64_t buckets = (numel + bucket - 1) / bucket, stride = (bucket + 1) / 2;
    const int64_t rest = numel - (buckets - 1) * bucket;
    const int64_t bytes = numel ? (buckets - 1) * stride + (rest + 1) / 2 : 0;
    keep.emplace_back(bytes, shift);
    uint8_t* codes = keep.back().as();
    for (int64_t j = 0; j < numel; ++j) {
      const int64_t at = j % bucket;
      codes[j / bucket * stride + at / 2] |= uint8_t((int(value(i, j)) + 7) << (at % 2 ? 4 : 0));
    }
    keep.emplace_back(4 * buckets);
    const float unit = 1;
    for (int64_t b = 0; b < buckets; ++b) std::memcpy(keep.back().data + 4 * b, &unit, 4);
    PacketView p = {};
    p.codec = CODEC_UNIFORM;
    p.bits = 4;
    p.value_dtype = F32;
    p.weight = double(i + 1);
    p.numel = p.k = numel;
    p.bucket = bucket;
    p.codes = codes;
    p.scales = keep.back().as();
    p.scale_stride = 4;
    p.code_stride = stride;
    views.push_back(p);
  }
  // 16-bit indices, float32 values
  void sparse(int64_t i, int64_t numel, int shift) {
    const int64_t count = (numel + 2) / 3, tiles = (numel + SPARSE_TILE - 1) / SPARSE_TILE;
    keep.emplace_back(2 * count, shift);
    char* indices = keep.back().data;
    keep.emplace_back(4 * count, shift);
    char* values = keep.back().data;
    starts.emplace_back(new int64_t[size_t(tiles + 1)]());
    for (int64_t k = 0; k < count; ++k) {
      const uint16_t local = uint16_t(3 * k % SPARSE_TILE);
      const float v = value(i, 3 * k);
      std::memcpy(indices + 2 * k, &local, 2);
      std::memcpy(values + 4 * k, &v, 4);
      for (int64_t t = 3 * k / SPARSE_TILE + 1; t <= tiles; ++t) starts.back()[size_t(t)] = k + 1;
    }
    PacketView p = {};
    p.codec = CODEC_SPARSE;
    p.form = 2;  // tile16
    p.bits = 32;
    p.value_dtype = F32;
    p.weight = double(i + 1);
    p.numel = numel;
    p.bucket = SPARSE_TILE;
    p.k = count;
    p.indices = reinterpret_cast<uint8_t*>(indices);
    p.values = reinterpret_cast<uint8_t*>(values);
    p.starts = starts.back().get();
    views.push_back(p);
  }
  std::vector<PacketView> views;
  std::vector<Block> keep;
  std::vector<std::unique_ptr<int64_t[]>> starts;
};

struct Layers {
  explicit Layers(const std::vector<int64_t>& sizes, int shift)
      : numel(sizes), dtype(sizes.size(), F32) {
    for (int64_t size : numel) {
      starts.push_back(starts.back() + size);
      keep.emplace_back(4 * size, shift);
      out.push_back(keep.back().data);
    }
  }
  float at(int64_t j) const {
    size_t l = 0;
    while (j >= starts[l + 1]) ++l;
    float v;
    std::memcpy(&v, static_cast<char*>(out[l]) + 4 * (j - starts[l]), 4);
    return v;
  }
  int64_t count() const { return int64_t(numel.size()); }
  std::vector<int64_t> numel, starts{0};
  std::vector<int> dtype;
  std::vector<Block> keep;
  std::vector<void*> out;
};

static void medians(const Packets& packets, const std::vector<int64_t>& numel, int shift) {
  const int64_t n = int64_t(packets.views.size());
  Layers to(numel, shift);
  SelectArgs a{};
  a.n = a.count = n;
  a.layers = to.count();
  a.numel = to.numel.data();
  a.dtype = to.dtype.data();
  a.op = SELECT_MEDIAN;
  a.median = MEDIAN_LOWER;
  a.out = to.out.data();
  a.threads = 2;
  a.packets = packets.views.data();
  a.starts = to.starts.data();
  Block scratch(2 * cpu().select->scratch(a) + 64);
  a.scratch = aligned(scratch);
  EXPECT(cpu().select->select(a) == 0, "finite packets were flagged");
  for (int64_t j = 0; j < to.starts.back(); ++j) {
    int64_t below = 0, equal = 0;
    for (int64_t i = 0; i < n; ++i) {
      below += value(i, j) < to.at(j);
      equal += value(i, j) == to.at(j);
    }
    EXPECT(below <= (n - 1) / 2 && (n - 1) / 2 < below + equal, "median of coordinate %d", int(j));
  }
}

static void distances(const Packets& packets, const std::vector<int64_t>& numel, bool wide) {
  const int64_t n = int64_t(packets.views.size()), entries = gram_entries(n, GRAM_DISTANCES);
  Layers to(numel, 0);
  std::vector<int64_t> segment{0, to.starts.back()}, first_chunk(2);
  std::vector<int64_t> sums(size_t(entries * gram_words(wide)));
  GramArgs a{};
  a.n = n;
  a.layers = to.count();
  a.starts = to.starts.data();
  a.dtype = to.dtype.data();
  a.kind = GRAM_DISTANCES;
  a.wide = wide;
  a.segments = 1;
  a.segment_starts = segment.data();
  a.sums = sums.data();
  a.threads = 2;
  a.first_chunk = first_chunk.data();
  a.packets = packets.views.data();
  Block scratch(2 * cpu().gram->scratch(a) + 64);
  a.scratch = aligned(scratch);
  cpu().gram->gram(a);
  const ExactForm form = gram_form(wide);
  const int64_t* at = sums.data();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k <= i; ++k, at += form.words()) {
      double want = 0;
      for (int64_t j = 0; j < to.starts.back(); ++j) {
        const double d = i == k ? value(i, j) : value(i, j) - value(k, j);
        want += d * d;
      }
      EXPECT(exact_value(at, form, false) == want, "packets %d %d", int(i), int(k));
    }
}

// H += sum, model += H: whole numbers throughout
static void steps(const Packets& packets, const std::vector<int64_t>& numel, int shift,
                  int accumulate) {
  const int64_t n = int64_t(packets.views.size());
  Layers h(numel, shift), new_h(numel, shift), model(numel, shift), next(numel, shift);
  std::vector<double> weights;
  for (const PacketView& p : packets.views) weights.push_back(p.weight);
  std::vector<int64_t> first_tile(numel.size() + 1);
  CombineArgs sum{};
  sum.n = n;
  sum.layers = h.count();
  sum.numel = h.numel.data();
  sum.dtype = h.dtype.data();
  sum.out_dtype = h.dtype.data();
  sum.weights = weights.data();
  sum.accumulate = accumulate;
  sum.divisor = 1;
  sum.threads = 2;
  sum.check = true;
  sum.first_tile = first_tile.data();
  sum.packets = packets.views.data();
  sum.starts = h.starts.data();
  Block scratch(2 * cpu().combine->scratch(sum) + 64);
  sum.scratch = aligned(scratch);
  StepArgs a{};
  a.sum = sum;
  const bool control = accumulate == ACC_F32;
  if (control) {
    a.sum.state = h.out.data();
    a.new_sum = new_h.out.data();
  }
  a.kind = STEP_SGD;
  a.lr = 1;
  a.model_dtype = h.dtype.data();
  a.model = model.out.data();
  a.new_model = next.out.data();
  EXPECT(cpu().combine->step(a) == 0, "finite packets were flagged");
  sum.out = h.out.data();
  EXPECT(cpu().combine->combine(sum) == 0, "finite packets were flagged");
  for (int64_t j = 0; j < h.starts.back(); ++j) {
    double want = 0;
    for (int64_t i = 0; i < n; ++i) want += weights[size_t(i)] * value(i, j);
    EXPECT(h.at(j) == want && next.at(j) == want, "coordinate %d", int(j));
    EXPECT(!control || new_h.at(j) == want, "sum of coordinate %d", int(j));
  }
}

int main() {
  for (int shift : {0, 1, 3})
    for (int64_t n : {1, 2, 3, 8, 9, 31, 33, 70})
      for (int64_t bucket : {1, 5, 8, 100, 65536})
        for (int64_t numel : {0, 1, 7, 8, 65, 1000, 17001}) {
          if (numel > 1000 && (bucket == 1 || n > 9)) continue;
          votes(n, numel, bucket, shift);
        }
  const std::vector<std::vector<int64_t>> shapes = {{0}, {1}, {0, 1, 17, 4097, 5, 1023}, {70001}};
  for (int shift : {0, 1, 3})
    for (const std::vector<int64_t>& numel : shapes)
      for (int64_t n : {1, 2, 5, 9})
        for (int64_t bucket : {3, 64, 65536}) {
          int64_t total = 0;
          for (int64_t size : numel) total += size;
          if (total > 70000 && (n != 5 || shift == 3)) continue;
          const Packets packets(n, total, bucket, shift);
          medians(packets, numel, shift);
          for (bool wide : {false, true}) distances(packets, numel, wide);
          for (int accumulate : {ACC_F32, ACC_F64, ACC_REPRODUCIBLE})
            steps(packets, numel, shift, accumulate);
        }
  std::printf("ok %s\n", cpu().name);
  return 0;
}
