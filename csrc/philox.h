// Philox4x32-10: the counter-based generator every random choice in flcore is drawn from.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// A stream is named by (seed, round, tensor, client); it is a function of position, with no state:
//   key     k0 = low 32 bits of seed        k1 = high 32 bits of seed
//   counter c0 = i >> 2  c1 = tensor  c2 = round  c3 = client        for element i
//   element i takes word (i & 3) of the block that the counter gives, so i < 2^34.
// Any part of a stream can be made anywhere, in any order, and has the same bits: integer arithmetic
// only. The same header serves C++ and CUDA.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FLCORE_HD __host__ __device__ __forceinline__
#else
#define FLCORE_HD inline
#endif

namespace flcore {

// One stream: the key and the three counter words that do not move along it.
struct PhiloxStream {
  uint32_t k0, k1;                 // seed, low and high word
  uint32_t tensor, round, client;  // c1, c2, c3
};

constexpr int64_t PHILOX_LENGTH = int64_t(1) << 34;  // elements of one stream

struct PhiloxBlock {
  uint32_t w[4];
};

struct PhiloxKey {
  uint32_t k0, k1;
};

constexpr int PHILOX_ROUNDS = 10;
constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;

// `static` gives each translation unit its own copy: no weak symbol can carry one instruction set's
// code into another's files.
static FLCORE_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                   const PhiloxKey& key) {
  const uint64_t p0 = uint64_t(PHILOX_M0) * c0;
  const uint64_t p1 = uint64_t(PHILOX_M1) * c2;
  c0 = uint32_t(p1 >> 32) ^ c1 ^ key.k0;
  c1 = uint32_t(p1);
  c2 = uint32_t(p0 >> 32) ^ c3 ^ key.k1;
  c3 = uint32_t(p0);
}

static FLCORE_HD void philox_bump(PhiloxKey& key) {
  key.k0 += 0x9E3779B9u;  // golden ratio
  key.k1 += 0xBB67AE85u;  // sqrt(3) - 1
}

static FLCORE_HD PhiloxBlock philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                           PhiloxKey key) {
  for (int r = 0; r < PHILOX_ROUNDS; ++r, philox_bump(key)) philox_round(c0, c1, c2, c3, key);
  return PhiloxBlock{{c0, c1, c2, c3}};
}

static inline PhiloxStream philox_stream(uint64_t seed, uint32_t round, uint32_t tensor,
                                         uint32_t client) {
  return PhiloxStream{uint32_t(seed), uint32_t(seed >> 32), tensor, round, client};
}

// Block `block` of a stream: elements 4 block .. 4 block + 3.
static FLCORE_HD PhiloxBlock philox_block(const PhiloxStream& s, uint32_t block) {
  return philox4x32_10(block, s.tensor, s.round, s.client, {s.k0, s.k1});
}

// 24 random bits as a float in [0, 1): every value a multiple of 2^-24, hence exact.
static FLCORE_HD float philox_uniform(uint32_t bits) { return float(bits >> 8) * 0x1p-24f; }

}  // namespace flcore
