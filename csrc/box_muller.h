// Standard normals from pairs of random words: the Box-Muller transform as a fixed sequence of
// float32 operations. Box, Muller, "A note on the generation of random normal deviates", 1958.
//
// Words 2k and 2k + 1 of a Philox stream give elements 2k and 2k + 1:
//   u1 = (word[2k] + 1) 2^-32 in (0, 1]        u2 = (word[2k + 1] >> 7) 2^-25 in [0, 1)
//   z[2k] = sqrt(-2 ln u1) cos(2 pi u2)        z[2k + 1] = sqrt(-2 ln u1) sin(2 pi u2)
// so |z| <= sqrt(64 ln 2) < 6.661 (the normal law has 2.7e-11 of its mass beyond), and a value is
// within 1e-6 of the transform in exact arithmetic.
//
// Only + - * / sqrt, each rounded to nearest, and integer operations: no fma, no math library, so
// every instruction set and device gives the same bits. The sequence is written out four times:
// csrc/cpu/normal.h, kernels/normal.cuh, pykernels/rng.py and, to be read first,
// python/flcore/reference/rng.py.
#pragma once

namespace flcore {

// ln(1 + f) = 2 atanh(s), s = f / (2 + f);  atanh(s) = s + s z P(z), z = s^2 <= 1/9, to 5e-9
constexpr float ATANH_0 = 0x1.5555p-2f, ATANH_1 = 0x1.99d27cp-3f, ATANH_2 = 0x1.1eb612p-3f,
                ATANH_3 = 0x1.1ef86cp-3f;
// ln 2 in two parts: HI has 16 bits, so that its product with an exponent is exact
constexpr float LN2_HI = 0x1.62e4p-1f, LN2_LO = 0x1.7f7d1cp-20f;

// sin(pi x / 2) = 1.5 x + x (SIN_0 + y (SIN_1 + y (..))), y = x^2 <= 1/4, to 2e-9; x is a multiple
// of 2^-23, so that 1.5 x is exact. SIN_0 = pi/2 - 1.5.
constexpr float SIN_0 = 0x1.21fb54p-4f, SIN_1 = -0x1.4abbbap-1f, SIN_2 = 0x1.465e3p-4f,
                SIN_3 = -0x1.2d7a86p-8f;
// cos(pi x / 2) = 1 + y (COS_1 + y (..)), to 1e-10
constexpr float COS_1 = -0x1.3bd3ccp+0f, COS_2 = 0x1.03c1dep-2f, COS_3 = -0x1.55c664p-6f,
                COS_4 = 0x1.d9f7bep-11f;

}  // namespace flcore
