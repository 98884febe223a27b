// Memory of the native tests in which a read or write one byte outside is an error of the address
// sanitizer.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

// A buffer that ends exactly where its allocation ends, `shift` bytes behind its begin.
struct Bytes {
  explicit Bytes(int64_t count, int shift = 1)
      : memory(new uint8_t[size_t(count + shift)]), data(memory.get() + shift) {
    std::memset(data, 0xa5, size_t(count));
  }
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* data;
};
