#include "exact.h"

#include <cmath>
#include <limits>
#include <vector>

namespace flcore {

// Lets the carries run: all digits but the last in [0, 2^32).
static void carry(std::vector<int64_t>& digits) {
  for (size_t k = 0; k + 1 < digits.size(); ++k) {
    const int64_t over = digits[k] >> 32;  // rounds down for negative digits too
    digits[k] -= over * (int64_t(1) << 32);
    digits[k + 1] += over;
  }
}

double exact_value(const int64_t* sum, const ExactForm& form, bool is_signed) {
  if (const int64_t special = sum[form.digits])
    return special >> 32 || is_signed ? std::numeric_limits<double>::quiet_NaN()
                                      : std::numeric_limits<double>::infinity();
  std::vector<int64_t> digits(sum, sum + form.digits);
  carry(digits);
  const bool negative = digits.back() < 0;
  if (negative) {
    for (int64_t& d : digits) d = -d;
    carry(digits);
  }
  int top = form.digits - 1;
  while (top > 0 && digits[size_t(top)] == 0) --top;
  unsigned __int128 m = 0;
  for (int k = top; k > top - 3; --k) m = (m << 32) | (k < 0 ? 0 : uint64_t(digits[size_t(k)]));
  if (m == 0) return 0.0;
  bool sticky = false;
  for (int k = 0; k <= top - 3; ++k) sticky |= digits[size_t(k)] != 0;
  int exponent = 32 * (top - 2) + form.unit;
  int bits = 0;
  for (unsigned __int128 rest = m; rest; rest >>= 1) ++bits;
  if (bits > 53) {
    const int drop = bits - 53;
    const unsigned __int128 half = (unsigned __int128)(1) << (drop - 1);
    const unsigned __int128 cut = m & ((half << 1) - 1);
    m >>= drop;
    exponent += drop;
    if (cut > half || (cut == half && (sticky || (m & 1)))) ++m;
  }
  const double value = std::ldexp(double(uint64_t(m)), exponent);
  return negative ? -value : value;
}

}  // namespace flcore
