// The shortest way from update and memory to codes and new memory: one bucket at a time, for codecs of
// one scale (codes_linear.h) and a client that keeps e alone, with a = b (EF14). Two loops a bucket:
//   u <- b e + s into L1, with the largest magnitude (which also tells whether all of u is finite) and
//        the sum the scale follows from,
//   e <- u - D and the codes, D in registers only.
// The same operations as by feedback_load, quantize_X and feedback_store, hence the same bits, but a
// value passes L1 once instead of four times. Memory decides what is left: 16 bytes a coordinate (g and
// e read, e_new fetched and written) plus the codes. e_new is written through the caches, unlike in
// feedback_store: stores past them come in bursts of a group, during which nothing is read, and
// stores of both kinds in turn wait for each other. Measured with two cores, the 4 bytes more cost
// less than either: 1.9 ms for 10,000,000 coordinates, where reading and writing alone take 1.6.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/codes.h"
#include "cpu/codes_linear.h"
#include "cpu/codes_measure.h"
#include "cpu/feedback.h"
#include "cpu/int_lanes.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

using RestKind = FeedbackKind<true, false, false, true>;

static bool keeps_rest(const QuantizeArgs& x) {
  const FeedbackArgs& f = x.feedback;
  return has_one_scale(x.codec.codec) && f.e && f.e_new && !f.h && !f.h_new && !f.v && !f.v_new &&
         f.a == f.b && f.state_dtype == F32;
}

struct NoSum {
  FLCORE_MEMBER void add(const float*) {}
  FLCORE_MEMBER double total(const float*, int64_t) const { return 0; }
};

// u of n coordinates, and what their scale follows from.
template <class Sums>
static Measured rest_load(const FeedbackFactors factors, const FeedbackSources from, int64_t n,
                          float* u) {
  Sums sums;
  vi32 tops = {};
  const auto sixteen = [&](int64_t i) FLCORE_LAMBDA {
    unroll<16 / LANES>([&](auto k) FLCORE_LAMBDA {
      const int64_t at = i + LANES * decltype(k)::value;
      const vf32 x = feedback_values<RestKind, vf32>(factors, from, at).u;
      store(u + at, x);
      tops = feedback_larger(tops, feedback_key(x));
    });
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    sixteen(i);
    sums.add(u + i);  // straight from the stores
  }
  if (i < n && n >= 16) sixteen(n - 16);  // some of it once more
  int32_t top = highest(tops);
  for (int64_t k = n < 16 ? 0 : n; k < n; ++k) {
    u[k] = feedback_values<RestKind, float>(factors, from, k).u;
    top = feedback_larger(top, feedback_key(u[k]));
  }
  return {float_of(uint32_t(top)), sums.total(u + i, n - i)};
}

// One bucket on its way; job.u is scratch and job.d the new e. False when u is not finite somewhere.
static bool rest_bucket(const FeedbackArgs& f, const FeedbackSources& from, float* u,
                        const BucketJob& job) {
  const FeedbackFactors factors = {f.a, f.b, f.p, f.q};
  const Summed kind = summed(job.c);
  const Measured m = kind == SUMMED_NONE ? rest_load<NoSum>(factors, from, job.n, u)
                     : kind == SUMMED_MAGNITUDES
                         ? rest_load<TermSum<SumMagnitudes>>(factors, from, job.n, u)
                         : rest_load<TermSum<SumSquares>>(factors, from, job.n, u);
  if (bits_of(m.top) >= 0x7f800000u) return false;
  quantize_scaled<true>(m, job);
  return true;
}

}  // namespace FLCORE_ISA
}  // namespace flcore
