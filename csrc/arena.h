// Working memory that a thread keeps from one call to the next: the system clears fresh pages, which
// costs as much as a good part of the work that is done on them.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace flcore {

class Arena {
 public:
  Arena() = default;
  ~Arena() {
    int64_t total = 0;
    for (Block& block : blocks()) {
      block.used = false;
      total += block.bytes;
    }
    if (total > KEEP) blocks().clear();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Memory for `count` values, on cache lines of its own, not initialised; valid until the arena goes.
  // One arena a thread at a time.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count > 0 ? count : 1) * int64_t(sizeof(T));
    Block* best = nullptr;
    for (Block& block : blocks())
      if (!block.used && block.bytes >= bytes && (!best || block.bytes < best->bytes)) best = &block;
    if (!best) {
      blocks().push_back({Memory(static_cast<char*>(::operator new(size_t(bytes), ALIGN))), bytes});
      best = &blocks().back();
    }
    best->used = true;
    return reinterpret_cast<T*>(best->memory.get());
  }

 private:
  static constexpr int64_t KEEP = int64_t(1) << 26;  // bytes a thread may hold between calls
  static constexpr std::align_val_t ALIGN = std::align_val_t(64);

  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, ALIGN); }
  };
  using Memory = std::unique_ptr<char, Free>;
  struct Block {
    Memory memory;
    int64_t bytes;
    bool used = false;
  };
  static std::vector<Block>& blocks() {
    static thread_local std::vector<Block> kept;
    return kept;
  }
};

}  // namespace flcore
