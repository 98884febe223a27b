// Local steps with exactly sized heap buffers at odd offsets: a read or write one byte outside is
// an error of the address sanitizer. Values are 0, 1, -1 and 2, which are exact in every dtype.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "expect.h"

using namespace flcore;

// A buffer that ends exactly where its allocation ends, at an unaligned address.
struct Buffer {
  Buffer(int64_t count, int dtype, int shift, double value)
      : count(count), dtype(dtype),
        memory(new char[size_t(count * dtype_bytes(dtype) + shift + 1)]) {
    data = memory.get() + 1 + shift;
    const float f = float(value);
    const uint16_t half = bits(value);
    const void* from = dtype == F64   ? static_cast<const void*>(&value)
                       : dtype == F32 ? static_cast<const void*>(&f)
                                      : static_cast<const void*>(&half);
    const int64_t size = dtype_bytes(dtype);
    for (int64_t i = 0; i < count; ++i) std::memcpy(data + i * size, from, size_t(size));
  }
  uint16_t bits(double value) const {
    const uint16_t sign = value < 0 ? 0x8000 : 0, magnitude = uint16_t(std::fabs(value));
    const uint16_t one = dtype == F16 ? 0x3c00 : 0x3f80;
    return uint16_t(sign | (magnitude == 0 ? 0 : magnitude == 1 ? one : 0x4000));
  }
  // whether every value is this one
  bool holds(double value) const {
    const Buffer other(1, dtype, 0, value);
    const int64_t size = dtype_bytes(dtype);
    for (int64_t i = 0; i < count; ++i)
      if (std::memcmp(data + i * size, other.data, size_t(size))) return false;
    return true;
  }
  int64_t count;
  int dtype;
  std::unique_ptr<char[]> memory;
  char* data;
};

struct Table {
  Table(const std::vector<int64_t>& numel, int dtype, int shift, double value) {
    for (int64_t n : numel) {
      keep.emplace_back(new Buffer(n, dtype, shift, value));
      address.push_back(keep.back()->data);
      shown.push_back(keep.back()->data);
    }
  }
  bool holds(double value) const {
    for (const auto& buffer : keep)
      if (!buffer->holds(value)) return false;
    return true;
  }
  std::vector<std::unique_ptr<Buffer>> keep;
  std::vector<void*> address;
  std::vector<const void*> shown;
};

// As one group of pieces, or as a group for each piece.
static void run(int dtype, int shift, bool one_group, int threads) {
  const std::vector<int64_t> numel = {0, 1, 15, 16, 17, 33, 4095, 4096, 4097, 3 * 4096 + 5};
  const int64_t pieces = int64_t(numel.size()), groups = one_group ? 1 : pieces;
  const std::vector<int> dtypes(size_t(pieces), dtype);
  std::vector<int64_t> first_piece, first_tile = {0}, all;
  for (int64_t k = 0; k <= groups; ++k) first_piece.push_back(one_group ? k * pieces : k);
  for (int64_t k = 0; k < groups; ++k) all.push_back(k);
  int64_t total = 0;
  for (int64_t n : numel) {
    first_tile.push_back(first_tile.back() + (n + LOCAL_TILE - 1) / LOCAL_TILE);
    total += n;
  }
  std::vector<double> tiles(size_t(first_tile.back())), norms(static_cast<size_t>(groups));
  std::vector<LocalNumbers> numbers(static_cast<size_t>(groups), LocalNumbers{1, 1, 0, 1e9, 1});
  LocalArgs args{};
  args.count = groups;
  args.group = all.data();
  args.first_piece = first_piece.data();
  args.first_tile = first_tile.data();
  args.numel = numel.data();
  args.dtype = dtypes.data();
  args.numbers = numbers.data();
  args.norms = norms.data();
  args.tiles = threads > 1 ? tiles.data() : nullptr;
  args.threads = threads;

  for (const bool with_q : {false, true})
    for (const bool clipped : {false, true})
      for (const bool full : {false, true})
        for (const int buffer : {0, 1, 2})  // none, first, old
          for (const bool nesterov : {false, true}) {
            Table x(numel, dtype, shift, 1), g(numel, dtype, shift, with_q ? 2 : 1);
            Table q(numel, dtype, shift, -1), state(numel, dtype, shift, buffer == 1 ? 2 : 0);
            args.kind = LOCAL_STEP;
            args.x = x.address.data();
            args.g = g.shown.data();
            args.q = with_q ? q.shown.data() : nullptr;
            args.state = buffer ? state.address.data() : nullptr;
            args.out = nullptr;
            args.clipped = clipped;
            args.full = full;
            args.nesterov = nesterov;
            args.first = buffer == 1;
            cpu().local_step->run(args);  // a bracket of 1, and 1 more of nesterov
            EXPECT(x.holds(buffer && nesterov ? -1 : 0), "step, dtype %d", dtype);
            EXPECT(!buffer || state.holds(1), "buffer, dtype %d", dtype);
          }

  args.clipped = args.full = args.nesterov = args.first = false;
  Table x(numel, dtype, shift, 2), g(numel, dtype, shift, 1), q(numel, dtype, shift, -1);
  Table state(numel, dtype, shift, 0), out(numel, dtype, shift, 0);
  args.x = x.address.data();
  args.g = g.shown.data();
  args.q = nullptr;
  args.out = out.address.data();
  args.state = state.address.data();
  const auto pass = [&](int kind, double rate) {
    args.kind = kind;
    for (LocalNumbers& n : numbers) n.rate = rate;
    cpu().local_step->run(args);
  };
  pass(LOCAL_NORM, 0);
  for (int64_t k = 0; k < groups; ++k) {
    const double n = double(one_group ? total : numel[size_t(k)]);
    EXPECT(norms[size_t(k)] == std::sqrt(n), "norm of group %d, dtype %d", int(k), dtype);
  }
  pass(LOCAL_SHIFT, -1);
  EXPECT(out.holds(1), "shift, dtype %d", dtype);
  pass(LOCAL_SAM, 0);
  EXPECT(out.holds(2), "sam, dtype %d", dtype);
  pass(LOCAL_UPDATE, 0);
  EXPECT(out.holds(1), "update, dtype %d", dtype);
  pass(LOCAL_DUAL, 0);
  EXPECT(out.holds(1) && state.holds(1), "dual, dtype %d", dtype);
  args.q = q.shown.data();
  pass(LOCAL_CONTROL, 1);  // 1 - -1 - 1
  EXPECT(out.holds(1) && state.holds(1), "control, dtype %d", dtype);
  EXPECT(x.holds(2) && g.holds(1) && q.holds(-1), "what is only read, dtype %d", dtype);
}

int main() {
  for (int dtype = 0; dtype < DTYPE_COUNT; ++dtype)
    for (int shift : {0, 1}) {
      run(dtype, shift, true, 3);
      run(dtype, shift, false, 1);
    }
  std::printf("ok %s\n", cpu().name);
  return 0;
}
