// Blocks of a row in its compute type, float or double: where they lie when they have that type and
// a whole number of cache lines, else a copy that is converted and filled up.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

constexpr int64_t BLOCK = 1024;  // values

// n rounded up to a multiple of 64 bytes
template <class T>
FLCORE_INLINE int64_t padded(int64_t n) {
  constexpr int64_t UNIT = 64 / int64_t(sizeof(T));
  return (n + UNIT - 1) / UNIT * UNIT;
}

template <int D>
static void widen_block(const void* from, int64_t at, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load_f32<D>(from, at + i));
  for (; i < n; ++i) to[i] = load1<D>(from, at + i);
}
template <int D>
static void narrow_block(const float* from, int64_t n, void* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store_lanes<D>(to, i, load<vf32>(from + i));
  for (; i < n; ++i) store1<D>(to, i, from[i]);
}

// Pointer to padded(n) values, of which those from n on are `fill` when there are any.
FLCORE_NOINLINE static const float* fetch_block(int dtype, const void* from, int64_t at, int64_t n,
                                                float* to, float fill) {
  if (dtype == F32) {
    const char* p = static_cast<const char*>(from) + 4 * at;
    if (n == padded<float>(n) && uintptr_t(p) % 4 == 0) return reinterpret_cast<const float*>(p);
    __builtin_memcpy(to, p, size_t(4 * n));
  } else if (dtype == F16) {
    widen_block<F16>(from, at, n, to);
  } else {
    widen_block<BF16>(from, at, n, to);
  }
  for (int64_t i = n; i < padded<float>(n); ++i) to[i] = fill;
  return to;
}
FLCORE_NOINLINE static const double* fetch_block(int, const void* from, int64_t at, int64_t n,
                                                 double* to, double fill) {
  const char* p = static_cast<const char*>(from) + 8 * at;
  if (n == padded<double>(n) && uintptr_t(p) % 8 == 0) return reinterpret_cast<const double*>(p);
  __builtin_memcpy(to, p, size_t(8 * n));
  for (int64_t i = n; i < padded<double>(n); ++i) to[i] = fill;
  return to;
}

namespace {  // member functions of a class with a name would be weak symbols

// Where padded(n) results go: to their place, or to a block that `deliver` converts and copies.
template <class T>
struct Place {
  T* values;
  int dtype;
  void* to;  // null: they are in their place
  int64_t n;

  void deliver() const {
    if (!to) return;
    if constexpr (sizeof(T) == 4) {
      if (dtype == F16) return narrow_block<F16>(values, n, to);
      if (dtype == BF16) return narrow_block<BF16>(values, n, to);
    }
    __builtin_memcpy(to, values, size_t(n) * sizeof(T));
  }
};

}  // namespace

template <class T>
static Place<T> place_block(int dtype, void* out, int64_t at, int64_t n, T* block) {
  char* p = static_cast<char*>(out) + dtype_bytes(dtype) * at;
  const bool here = dtype_bytes(dtype) == int64_t(sizeof(T)) && n == padded<T>(n) &&
                    uintptr_t(p) % sizeof(T) == 0;
  if (here) return {reinterpret_cast<T*>(p), dtype, nullptr, n};
  return {block, dtype, p, n};
}

}  // namespace FLCORE_ISA
}  // namespace flcore
