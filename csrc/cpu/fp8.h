// Finite numbers of 8 bits, e4m3 and e5m2, as float32. The bits below the sign go to their place in
// a float32, which is multiplied by what the biases of the exponents differ in: exact, subnormals
// included.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

struct Fp8 {
  int down;       // from the top of a word
  uint32_t bits;  // that are taken: the sign and the seven others
  float unit;
};

FLCORE_INLINE Fp8 fp8_of(int kind) {
  return kind == QW_E5M2 ? Fp8{3, 0x8fe00000u, 0x1p112f} : Fp8{4, 0x87f00000u, 0x1p120f};
}

// Of the low byte of each lane. The shift downwards repeats the sign.
FLCORE_INLINE vf32 fp8_values(const vi32& q, const Fp8& f) {
  return (vf32)((vu32)((q << 24) >> f.down) & f.bits) * f.unit;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
