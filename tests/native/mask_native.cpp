// Words, masks and their sums with exactly sized heap buffers at odd offsets, for the sanitizers;
// and the first block of RFC 8439, section 2.3.2.
#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "expect.h"

using namespace flcore;

// `count` values of `size` bytes, ending exactly where the allocation ends, `shift` bytes off.
struct Exact {
  Exact(int64_t count, int64_t size, int shift)
      : memory(new char[size_t(count * size + shift) + (count * size + shift == 0)]),
        data(memory.get() + shift) {
    std::memset(memory.get(), 0, size_t(count * size + shift));
  }
  uint32_t* words() { return static_cast<uint32_t*>(data); }
  std::unique_ptr<char[]> memory;
  void* data;
};

static void vector_of_the_rfc() {
  MaskStream s{{}, {0x09000000u, 0x4a000000u, 0}, false};
  for (uint32_t w = 0; w < 8; ++w) s.key[w] = 0x03020100u + 0x04040404u * w;
  uint32_t words[16] = {};
  cpu().mask->add({16, words, words, {1, &s, 16}, ~0u, 1});
  EXPECT(words[0] == 0xe4e7f110u && words[7] == 0x4e6cd4c3u && words[15] == 0x4e3c50a2u,
         "%08x %08x %08x", words[0], words[7], words[15]);
}

static void round_trip(int64_t numel, int dtype, int shift, int64_t position, uint32_t keep) {
  const int64_t levels = 100, clients = 11;
  std::vector<MaskStream> on(3), off(3);
  for (uint32_t s = 0; s < 3; ++s) {
    on[s] = MaskStream{{s + 1, 2, 3, 4, 5, 6, 7, 8}, {9, s, 11}, s == 1};
    off[s] = on[s];
    off[s].negative = !on[s].negative;
  }
  std::vector<std::unique_ptr<Exact>> keep_alive;
  std::vector<const uint32_t*> rows;
  Exact x(numel, dtype_bytes(dtype), shift);  // zeros: the middle of the grid
  for (int64_t i = 0; i < clients; ++i) {
    keep_alive.emplace_back(new Exact(numel, 4, shift));
    uint32_t* out = keep_alive.back()->words();
    rows.push_back(out);
    const int64_t clipped = cpu().mask->quantize({numel, dtype, x.data, out, 0.5, 2.0,
                                                  double(levels), levels / 4.0, i % 2 == 0,
                                                  philox_stream(1, 2, 3, uint32_t(i)), i,
                                                  {3, on.data(), position}, keep, 2});
    EXPECT(clipped == 0, "numel %d dtype %d", int(numel), dtype);
  }
  Exact acc(numel, 4, shift), out(numel, dtype_bytes(dtype), shift);
  cpu().mask->sum({clients, numel, rows.data(), acc.words(), true, keep, 2});
  for (int64_t i = 0; i < clients; ++i)
    cpu().mask->add({numel, acc.words(), acc.words(), {3, off.data(), position}, keep, 2});
  for (int64_t j = 0; j < numel; ++j) {
    uint32_t word;
    std::memcpy(&word, acc.words() + j, 4);
    EXPECT(word == clients * levels / 2, "word %d is %u", int(j), word);
  }
  const int64_t above = cpu().mask->dequantize(
      {numel, acc.words(), double(clients * levels), 0.5, dtype, out.data, 2});
  EXPECT(above == 0, "%d above the top", int(above));
  EXPECT(!numel || !std::memcmp(out.data, x.data, size_t(numel * dtype_bytes(dtype))),
         "the sum of zeros is not zero, numel %d dtype %d", int(numel), dtype);
}

int main() {
  vector_of_the_rfc();
  for (int dtype = 0; dtype < DTYPE_COUNT; ++dtype)
    for (int64_t numel : {0, 1, 17, 255, 2049, 5000})
      for (int shift : {0, 1, 3})
        for (int64_t position : {int64_t(0), int64_t(1), MASK_LENGTH - 5000})
          round_trip(numel, dtype, shift, position, shift ? 0xffffu : ~0u);
  std::printf("ok %s\n", cpu().name);
  return 0;
}
