// What a receiver does with bytes from a stranger: check them, then decode them in every way. The
// only outcomes are "decodes" and PacketError; everything else is for the sanitizers to find. Every
// buffer ends where its allocation ends, so that a byte read or written outside is an error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "api.h"
#include "check.h"
#include "wire.h"

namespace target {

using namespace flcore;

constexpr uint64_t MAX_NUMEL = uint64_t(1) << 20;

inline void expect(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// `bytes` bytes at an address `shift` off the allocation's start, ending where it ends.
struct Exact {
  Exact(int64_t bytes, int shift) : memory(new uint8_t[size_t(bytes + shift)]) {
    data = memory.get() + shift;
    std::memset(data, 0, size_t(bytes));
  }
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* data;
};

inline void expect_finite(const uint8_t* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float x;
    std::memcpy(&x, values + 4 * i, 4);
    expect(std::isfinite(x), "a packet that was accepted decodes to a value that is not finite");
  }
}

// Into two layers of both dtypes, and as rows of a tile in the middle.
inline void decode(const wire::Packet& p, int shift) {
  const int64_t numel = int64_t(p.header.numel), first = numel / 3;
  const int64_t starts[3] = {0, first, numel};
  const int dtypes[2] = {F32, F64};
  const PacketView view = p.view(0.5);
  for (bool add : {true, false}) {
    const Exact low(4 * first, shift), high(8 * (numel - first), shift);
    void* out[2] = {low.data, high.data};
    const DecodeArgs args{numel, 1, &view, 2, starts, dtypes, out, 2};
    (add ? cpu().decode->add : cpu().decode->dense)(args);
    if (!add) expect_finite(low.data, first);
  }
  const int64_t begin = numel / 5, count = (numel - begin) / 2 < 5000 ? (numel - begin) / 2 : 5000;
  if (count <= 0) return;
  const Exact rows(2 * 4 * count, 0);
  struct alignas(64) Work {
    float floats[DECODE_WORK];
  };
  const std::unique_ptr<Work> work(new Work);
  const PacketView views[2] = {view, view};
  cpu().decode->rows(views, 2, begin, count, reinterpret_cast<float*>(rows.data), count,
                     work->floats);
  expect(std::memcmp(rows.data, rows.data + 4 * count, size_t(4 * count)) == 0,
         "the same packet gave two different rows");
}

// Whether the bytes are a packet.
inline bool read(const uint8_t* bytes, size_t size, int shift) {
  const Exact copy(int64_t(size), shift);
  if (size) std::memcpy(copy.data, bytes, size);
  wire::Limits limits;
  limits.max_numel = MAX_NUMEL;
  try {
    const wire::Packet p = wire::parse(copy.data, size, limits);
    decode(p, shift);
    return true;
  } catch (const PacketError& error) {
    expect(std::string(error.what()).size() > 10, "an error without a sentence");
    return false;
  }
}

// Writes the size and the checksum that the bytes should have, so that the checks behind are reached.
inline void reseal(uint8_t* bytes, size_t size) {
  if (size < size_t(wire::HEADER_BYTES)) return;
  const uint64_t payload = size - uint64_t(wire::HEADER_BYTES);
  for (int i = 0; i < 8; ++i) bytes[24 + i] = uint8_t(payload >> (8 * i));
  wire::seal(bytes, size);
}

}  // namespace target
