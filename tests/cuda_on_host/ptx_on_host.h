// What the functions of kernels/ptx.cuh mean, for the threads of cuda_runtime.h beside this.
// Products of a contraction are exact and are added in float64: hardware differs in the last place.
// An asynchronous copy lands when its thread waits for it, which shows a wait that is missing; with
// the threads in reverse order it lands at once, which shows a copy that comes too early.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <deque>
#include <map>
#include <vector>

namespace flcore {
namespace cuda {

// ---- tensor cores ------------------------------------------------------------------------------

struct Registers {  // of the 32 lanes, as one lane sees them
  uint64_t lane[32];
  explicit Registers(uint32_t low, uint32_t high = 0) {
    const uint64_t* all = ::on_host::exchange(low | uint64_t(high) << 32);
    for (int i = 0; i < 32; ++i) lane[i] = all[i];
  }
  uint32_t low(int i) const { return uint32_t(lane[i]); }
  uint32_t high(int i) const { return uint32_t(lane[i] >> 32); }
};

// term(a, b): the sum over what two registers hold. c += over halves and the four lanes of a row.
template <class C, class Term>
void mma_on_host(C (&c)[4], const Registers* a, const Registers& b, int halves, const Term& term) {
  const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    auto sum = decltype(term(0u, 0u))(0);
    for (int h = 0; h < halves; ++h)
      for (int k = 0; k < 4; ++k) {
        const uint32_t x = i < 2 ? a[h].low(4 * g + k) : a[h].high(4 * g + k);
        const uint32_t y = h ? b.high(4 * column + k) : b.low(4 * column + k);
        sum += term(x, y);
      }
    c[i] = C(c[i] + sum);
  }
}

inline float half_value(uint32_t bits) { return on_host::f16_to_f32(uint16_t(bits)); }
inline float bfloat_value(uint32_t bits) { return on_host::bf16_to_f32(uint16_t(bits)); }

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Registers x[2] = {Registers(a[0], a[1]), Registers(a[2], a[3])}, y(b0, b1);
  mma_on_host(c, x, y, 2, [](uint32_t p, uint32_t q) {
    return double(half_value(p)) * half_value(q) +
           double(half_value(p >> 16)) * half_value(q >> 16);
  });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Registers x[2] = {Registers(a[0], a[1]), Registers(a[2], a[3])}, y(b0, b1);
  mma_on_host(c, x, y, 2, [](uint32_t p, uint32_t q) {
    return double(bfloat_value(p)) * bfloat_value(q) +
           double(bfloat_value(p >> 16)) * bfloat_value(q >> 16);
  });
}

inline int32_t dot_u8s8(uint32_t p, uint32_t q) {
  int32_t sum = 0;
  for (int i = 0; i < 32; i += 8) sum += int32_t(uint8_t(p >> i)) * int8_t(uint8_t(q >> i));
  return sum;
}
inline void mma_u8s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Registers x[2] = {Registers(a[0], a[1]), Registers(a[2], a[3])}, y(b0, b1);
  mma_on_host(c, x, y, 2, dot_u8s8);
}
inline void mma_u8s8_half(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const Registers x[1] = {Registers(a0, a1)}, y(b);
  mma_on_host(c, x, y, 1, dot_u8s8);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint64_t address = reinterpret_cast<uintptr_t>(row);
  if (address % 16) throw std::runtime_error("misaligned row of a matrix");
  const Registers rows(uint32_t(address), uint32_t(address >> 32));
  const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  for (int i = 0; i < 4; ++i)
    std::memcpy(&r[i], reinterpret_cast<const char*>(rows.lane[8 * i + g]) + 4 * t, 4);
}

// ---- copies to shared memory that run on their own ----------------------------------------------

inline uint64_t cache_policy(bool) { return 0; }

struct Copy {
  char* dst;
  char bytes[16];
};
struct Copies {  // of a thread
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
inline std::map<unsigned, Copies> copies_under_way;

inline void copy_async(void* dst, const void* src, int bytes, uint64_t = 0) {
  if (reinterpret_cast<uintptr_t>(dst) % 16 || reinterpret_cast<uintptr_t>(src) % 16 || bytes < 0 ||
      bytes > 16)
    throw std::runtime_error("misaligned copy");
  Copy copy{static_cast<char*>(dst), {}};
  std::memcpy(copy.bytes, src, size_t(bytes));
  if (::on_host::reversed)
    std::memcpy(dst, copy.bytes, 16);
  else
    copies_under_way[threadIdx.x].open.push_back(copy);
}
inline void copy_commit() {
  Copies& mine = copies_under_way[threadIdx.x];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int LEFT>
void copy_wait() {
  Copies& mine = copies_under_way[threadIdx.x];
  for (; mine.groups.size() > size_t(LEFT); mine.groups.pop_front())
    for (const Copy& copy : mine.groups.front()) std::memcpy(copy.dst, copy.bytes, 16);
}

// ---- pairs of 16-bit values ---------------------------------------------------------------------

template <class F>
uint32_t pairwise(const F& f) {
  return uint32_t(f(0)) | uint32_t(f(16)) << 16;
}
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  return pairwise(
      [&](int i) { return on_host::f32_to_f16(half_value(a >> i) - half_value(b >> i)); });
}
// Operands have few enough digits for the product to be exact in float32.
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  return pairwise([&](int i) {
    return on_host::f32_to_f16(half_value(a >> i) * half_value(b >> i) + half_value(c >> i));
  });
}
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return pairwise([&](int i) {
    return on_host::f32_to_bf16(bfloat_value(a >> i) * bfloat_value(b >> i) +
                                bfloat_value(c >> i));
  });
}
inline uint32_t pack_bf16x2(float low, float high) {
  return uint32_t(on_host::f32_to_bf16(low)) | uint32_t(on_host::f32_to_bf16(high)) << 16;
}

}  // namespace cuda
}  // namespace flcore
