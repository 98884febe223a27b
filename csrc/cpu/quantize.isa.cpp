// Codes of buckets with feedback, in one pass over memory: for each group of buckets
//   s, t, u from update and memory (cpu/feedback.h),  codes and D from u (cpu/codes_*.h),
//   e <- t - D,  h <- h + D,  v <- s
// A group is about GROUP coordinates and lives in L1 or L2 between the three. Reads the update and the
// state once, writes new state and codes once: with e in float32 12 bytes a coordinate plus bits / 8,
// with e and h 20, without state 4; one more read of update and state when state is updated in place,
// because a NaN anywhere must leave it unchanged. Buckets depend on nothing but their own coordinates
// and random bits on the coordinate: the same bytes for any number of threads and any level.
// Codecs of one scale for a client with e alone go a shorter way to the same bits: quantize_rest.h.
#include "api.h"
#include "cpu/chunks.h"
#include "cpu/codes.h"
#include "cpu/codes_float.h"
#include "cpu/codes_linear.h"
#include "cpu/codes_rotated.h"
#include "cpu/codes_thc.h"
#include "cpu/feedback.h"
#include "cpu/layers.h"
#include "cpu/philox_bits.h"
#include "cpu/quantize_rest.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t GROUP = 1024;
constexpr int64_t SLACK = 64;  // floats between the parts of the scratch

// ---- codecs ------------------------------------------------------------------------------------

// One bucket, or a run of whole ones for the codecs that take it.
static void quantize_bucket(const BucketJob& job) {
  switch (job.c.codec) {
    case CODEC_DENSE: return quantize_dense(job);
    case CODEC_NATURAL: return quantize_natural(job);
    case CODEC_MINIFLOAT: return quantize_minifloat(job);
    case CODEC_SIGN:
    case CODEC_UNIFORM:
    case CODEC_TERNARY: return quantize_scaled(job);
    case CODEC_AFFINE: return quantize_affine(job);
    case CODEC_ROTATED: return quantize_rotated(job);
    case CODEC_THC: return quantize_thc(job);
  }
}

static bool takes_runs(int codec) {
  return codec == CODEC_DENSE || codec == CODEC_NATURAL || codec == CODEC_MINIFLOAT;
}

// ---- groups of buckets -------------------------------------------------------------------------

// Buckets of a group: as many coordinates as fill whole cache lines, if that is possible.
static int64_t group_buckets(int64_t bucket) {
  int64_t count = GROUP / bucket;
  for (int64_t step = 16; step > 1; step /= 2)
    if (bucket % (16 / step) == 0 && count >= step) {
      count -= count % step;
      break;
    }
  return count < 1 ? 1 : count;
}

struct Workspace {
  FeedbackBuffers feedback;
  float *d, *work;
  uint32_t* random;
};

static int64_t longest(const CodecArgs& c) {
  return (group_buckets(c.bucket) * c.bucket + SLACK - 1) / SLACK * SLACK;
}

// feedback, d, random bits (half a word a coordinate) and what a codec needs
int64_t scratch_floats(const QuantizeArgs& x) {
  const int64_t n = longest(x.codec), bucket = (x.codec.bucket + SLACK - 1) / SLACK * SLACK;
  return (FEEDBACK_PARTS + 1) * n + (n / 2 + 2 * SLACK) + (2 * bucket + SLACK);
}

static Workspace workspace(const QuantizeArgs& x, int64_t part) {
  const int64_t n = longest(x.codec);
  float* base = x.scratch + part * scratch_floats(x);
  float* d = base + FEEDBACK_PARTS * n;
  float* random = d + n;
  return {feedback_buffers(base, n), d, random + n / 2 + 2 * SLACK,
          reinterpret_cast<uint32_t*>(random)};
}

// The random bits of coordinates [begin, begin + count), from whole groups of blocks of the stream.
static const uint16_t* random_bits(const QuantizeArgs& x, int64_t begin, int64_t count,
                                   uint32_t* words) {
  constexpr int64_t STEP = 4 * PHILOX_GROUP;
  const int64_t first = begin / 8 * 4, end = (begin + count + 1) / 2;
  philox_fill<PhiloxRaw>(x.codec.rounding, first, (end - first + STEP - 1) / STEP * STEP, words);
  return reinterpret_cast<const uint16_t*>(words) + (begin - 2 * first);
}

// The bucket at `at` of the group [begin, begin + count), or a run of them of `step` coordinates.
static BucketJob bucket_job(const QuantizeArgs& x, const Workspace& w, int64_t begin, int64_t at,
                            int64_t n, const float* u, const uint16_t* random, float* d) {
  const CodecArgs& c = x.codec;
  const int64_t index = (begin + at) / c.bucket;
  return {c, index, begin + at, n, u, random ? random + at : nullptr,
          x.scales + index * c.scale_stride, x.codes + index * c.code_stride, d, w.work};
}

static void quantize_group(const QuantizeArgs& x, const Workspace& w, int64_t begin, int64_t count,
                           const float* u) {
  const CodecArgs& c = x.codec;
  const uint16_t* random = c.stochastic ? random_bits(x, begin, count, w.random) : nullptr;
  const int64_t step = takes_runs(c.codec) ? count : c.bucket;
  for (int64_t at = 0; at < count; at += step) {
    const int64_t left = count - at, n = left < step ? left : step;
    quantize_bucket(bucket_job(x, w, begin, at, n, u + at, random, w.d + at));
  }
}

// Update, codes and state of a group, bucket by bucket (cpu/quantize_rest.h).
static bool quantize_rest(const QuantizeArgs& x, const Workspace& w, int64_t begin, int64_t count,
                          int64_t& layer) {
  const FeedbackArgs& f = x.feedback;
  const uint16_t* random = x.codec.stochastic ? random_bits(x, begin, count, w.random) : nullptr;
  float* e = static_cast<float*>(f.e_new) + begin;
  for (int64_t at = 0; at < count; at += x.codec.bucket) {
    const int64_t left = count - at, n = left < x.codec.bucket ? left : x.codec.bucket;
    const FeedbackSources from = feedback_sources(f, begin + at, n, layer, w.feedback);
    if (!rest_bucket(f, from, w.feedback.u,
                     bucket_job(x, w, begin, at, n, w.feedback.u, random, e + at)))
      return false;
  }
  return true;
}

// body(part, begin, count, layer) for each group; a part is a thread's share. Stops early where body
// returns false, and returns whether all were done.
template <class Body>
static bool for_groups(const QuantizeArgs& x, const Body& body) {
  const FeedbackArgs& f = x.feedback;
  const int64_t size = group_buckets(x.codec.bucket) * x.codec.bucket;
  const int64_t groups = (f.numel + size - 1) / size;
  int32_t bad = 0;
  for_ranges(groups, f.threads, [&](int64_t part, int64_t group, int64_t end) {
    if (group == end) return;
    int64_t layer = find_layer(f.starts, f.layers, group * size);
    const Workspace w = workspace(x, part);
    for (; group < end; ++group) {
      const int64_t begin = group * size, left = f.numel - begin;
      if (!body(w, begin, left < size ? left : size, layer)) {
        __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        break;
      }
    }
    feedback_fence();
  });
  return bad == 0;
}

bool quantize(const QuantizeArgs& x) {
  const FeedbackArgs& f = x.feedback;
  if (x.check && !for_groups(x, [&](const Workspace& w, int64_t begin, int64_t count,
                                    int64_t& layer) FLCORE_LAMBDA {
        return feedback_load(f, begin, count, layer, w.feedback).finite;
      }))
    return false;
  if (keeps_rest(x))
    return for_groups(x, [&](const Workspace& w, int64_t begin, int64_t count,
                             int64_t& layer) FLCORE_LAMBDA {
      return quantize_rest(x, w, begin, count, layer);
    });
  return for_groups(x, [&](const Workspace& w, int64_t begin, int64_t count,
                           int64_t& layer) FLCORE_LAMBDA {
    const FeedbackBlock block = feedback_load(f, begin, count, layer, w.feedback);
    if (!block.finite) return false;
    quantize_group(x, w, begin, count, block.u);
    feedback_store(f, begin, count, block, w.d, w.feedback.t);
    return true;
  });
}

}  // namespace
}  // namespace FLCORE_ISA

extern const QuantizeFns FLCORE_TABLE(quantize);
const QuantizeFns FLCORE_TABLE(quantize) = {&FLCORE_ISA::quantize, &FLCORE_ISA::scratch_floats};

}  // namespace flcore
