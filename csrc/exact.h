// Exact sums of float64 numbers: fixed point in 32-bit digits, each held in 64 bits so that carries
// wait until the end. Integers add in any order, so the sum does not depend on threads, chunks or
// machines (the long accumulator of U. Kulisch, cut to the range that a kernel can produce).
#pragma once

#include <cstdint>
#include <cstring>

#include "api.h"

namespace flcore {

// Digits, the first worth 2^unit, then one word: infinities counted in units, NaN in 2^32.
struct ExactForm {
  int unit;
  int digits;
  constexpr int words() const { return digits + 1; }
};

// Of the sums of gram, see GramArgs.
constexpr ExactForm gram_form(bool wide) {
  return wide ? ExactForm{GRAM_UNIT_F64, GRAM_DIGITS_F64}
              : ExactForm{GRAM_UNIT_F32, GRAM_DIGITS_F32};
}

static inline void exact_add(int64_t* sum, const ExactForm& form, double value) {
  uint64_t u;
  std::memcpy(&u, &value, 8);
  const int64_t exponent = int64_t((u >> 52) & 0x7ff);
  uint64_t mantissa = u & ((uint64_t(1) << 52) - 1);
  if (exponent == 0x7ff) {
    sum[form.digits] += mantissa ? int64_t(1) << 32 : 1;
    return;
  }
  if (exponent) mantissa |= uint64_t(1) << 52;
  if (mantissa == 0) return;
  int64_t place = (exponent ? exponent : 1) - 1075 - form.unit;  // of the last bit of the mantissa
  if (place < 0) {  // only zeros are cut: values are multiples of 2^unit
    mantissa = place > -64 ? mantissa >> -place : 0;
    place = 0;
  }
  const int64_t digit = place >> 5;
  if (digit + 2 >= form.digits) {
    sum[form.digits] += 1;
    return;
  }
  const unsigned __int128 wide = (unsigned __int128)(mantissa) << (place & 31);
  const int64_t sign = u >> 63 ? -1 : 1;
  sum[digit] += sign * int64_t(uint32_t(wide));
  sum[digit + 1] += sign * int64_t(uint32_t(wide >> 32));
  sum[digit + 2] += sign * int64_t(uint32_t(wide >> 64));
}

// Rounds to the nearest float64, ties to even. NaN also stands for an infinity in a signed sum.
double exact_value(const int64_t* sum, const ExactForm& form, bool is_signed);

}  // namespace flcore
