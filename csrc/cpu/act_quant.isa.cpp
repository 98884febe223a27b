// Dynamic quantisation of the rows of activations to 8 bits, one scale for a row or for blocks of
// it, with the sum of the codes of every block (the formulas are in act_quant.h). A block is read
// twice, the second time from cache: 1 to 4 bytes a value from memory, 1 written. Sums are exact,
// so the bits do not depend on level or threads.
#include "cpu/act_quant.h"

#include "api.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"

namespace flcore {
namespace FLCORE_ISA {

template <int D>
static void quantize_row(const ActQuantArgs& a, int64_t row) {
  const char* x = static_cast<const char*>(a.x) + dtype_bytes(D) * row * a.x_stride;
  int8_t* codes = static_cast<int8_t*>(a.codes) + row * a.k;
  const int64_t count = (a.k + a.block - 1) / a.block;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = b * a.block, n = a.k - first < a.block ? a.k - first : a.block;
    const ActScale s = measure_block<D>(x, first, n, a.asymmetric);
    const int32_t centred = code_block<D>(x, first, n, s, codes + first);
    a.scales[row * count + b] = s.scale;
    const int32_t zero = s.inverse == 0.0f ? 0 : s.zero + 128;  // of the codes as they are stored
    a.sums[row * count + b] = a.asymmetric ? centred + int32_t(n) * zero : centred;
    if (!a.asymmetric) continue;
    a.zeros[row * count + b] = uint8_t(zero);
    const int8_t flip = int8_t(s.inverse == 0.0f ? 0 : -128);
    for (int64_t i = 0; i < n; ++i) codes[first + i] = int8_t(codes[first + i] ^ flip);
  }
}

static void quantize(const ActQuantArgs& a) {
  for_chunks(a.rows, a.threads, [&](int64_t row) {
    if (a.x_dtype == F32)
      quantize_row<F32>(a, row);
    else if (a.x_dtype == F16)
      quantize_row<F16>(a, row);
    else
      quantize_row<BF16>(a, row);
  });
}

}  // namespace FLCORE_ISA

extern const ActQuantFns FLCORE_TABLE(act_quant);
const ActQuantFns FLCORE_TABLE(act_quant) = {&FLCORE_ISA::quantize};

}  // namespace flcore
