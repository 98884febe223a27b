// Lloyd-Max quantisers of the standard normal distribution with 1 to 4 bits: the positive half of
// the centroids, and the boundaries between neighbours, which lie in the middle. Shared by the CPU
// and the CUDA kernels; reference/codes_rotated.py has the same numbers. One bit needs no magnitude
// of its own (the block's scale makes up for it): its centroid is 1, transforms of codes integers.
// Max, "Quantizing for minimum distortion", IRE Trans. Inform. Theory 6, 1960; Lloyd, "Least
// squares quantization in PCM", IEEE Trans. Inform. Theory 28, 1982.
#pragma once

#include <cstdint>

namespace flcore {

constexpr int ROTATION_BITS = 4;            // at most
constexpr int ROTATION_HALF = 8;            // centroids of the positive half, at most
constexpr int64_t ROTATION_MIN_BLOCK = 256;
constexpr float ROTATION_LARGEST = 0x1p112f;  // scales are cut here: decoded values are finite

constexpr float ROTATION_CENTROID[ROTATION_BITS + 1][ROTATION_HALF] = {
    {},
    {1.0f},
    {0.45278004f, 1.51041761f},
    {0.24509416f, 0.75600525f, 1.34390926f, 2.15194567f},
    {0.12839501f, 0.38804823f, 0.65675900f, 0.94234027f, 1.25623095f, 1.61804607f, 2.06901673f,
     2.73258880f}};

// [b][k] between centroids k and k + 1
constexpr float rotation_bound(int bits, int k) {
  return (ROTATION_CENTROID[bits][k] + ROTATION_CENTROID[bits][k + 1]) * 0.5f;
}

}  // namespace flcore
