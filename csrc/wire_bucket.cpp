// Rules of bucket packets: coordinates cut into buckets of `tile`, for each some scales and one code
// of a fixed width a coordinate. One table for all codecs of this shape.
#include <cstring>

#include "rotation.h"
#include "wire_rules.h"

namespace flcore {
namespace wire {
namespace {

#define NEED FLCORE_NEED

// Elements of a CODEC_MINIFLOAT packet by form: 1 e4m3, 2 e5m2, 3 e3m2, 4 e2m3, 5 e2m1, 6 int8
// (64ths), 7 the codebook nf4. Their bits, the exponent of the largest and its value.
constexpr int MINIFLOAT_FORMS = 8;
constexpr int MINIFLOAT_BITS[MINIFLOAT_FORMS] = {0, 8, 8, 6, 6, 4, 8, 4};
constexpr int MINIFLOAT_EMAX[MINIFLOAT_FORMS] = {0, 8, 15, 4, 2, 2, 0, 0};
constexpr double MINIFLOAT_LARGEST[MINIFLOAT_FORMS] = {0, 448, 57344, 28, 7.5, 6, 127.0 / 64, 1};

bool one_of(int x, int a, int b) { return x == a || x == b; }
bool power_of_two(uint32_t x) { return x && !(x & (x - 1)); }

const char* name_of(const Header& h) { return BUCKET_RULES[h.codec].name; }

bool form_known(const Header& h) {
  switch (h.codec) {
    case CODEC_NATURAL:
    case CODEC_TERNARY: return h.index <= 1;
    case CODEC_MINIFLOAT: return h.index >= 1 && h.index < MINIFLOAT_FORMS;
    default: return h.index == 0;
  }
}

bool bits_known(const Header& h) {
  switch (h.codec) {
    case CODEC_DENSE: return h.bits == 8 * dtype_bytes(h.value_dtype);
    case CODEC_SIGN: return h.bits == 1;
    case CODEC_UNIFORM: return h.bits >= 2 && h.bits <= 8;
    case CODEC_AFFINE: return h.bits >= 1 && h.bits <= 8;
    case CODEC_NATURAL: return h.bits == (h.index == 0 ? 9 : 8);
    case CODEC_MINIFLOAT: return h.bits == MINIFLOAT_BITS[h.index];
    case CODEC_TERNARY: return h.bits == 2;
    default: return h.bits >= 1 && h.bits <= ROTATION_BITS;  // rotated
  }
}

bool dtype_known(const Header& h) {
  switch (h.codec) {
    case CODEC_DENSE: return h.value_dtype <= BF16;
    case CODEC_MINIFLOAT: return one_of(h.value_dtype, F32, WIRE_E8M0);
    case CODEC_NATURAL:
    case CODEC_ROTATED: return h.value_dtype == F32;
    default: return one_of(h.value_dtype, F32, BF16);
  }
}

void check_header(const Header& h) {
  NEED(dtype_known(h), "value dtype ", int(h.value_dtype), " is not one that ", name_of(h),
       " packets have");
  NEED(form_known(h), "form ", int(h.index), " is not one that ", name_of(h), " packets have");
  NEED(bits_known(h), int(h.bits), " bits a code are not what this form of ", name_of(h),
       " packets has");
  NEED(h.tile >= 1 && h.tile <= BUCKET_MAX, "expected buckets of 1 to ", BUCKET_MAX,
       " coordinates, got ", h.tile);
  if (h.codec == CODEC_ROTATED)
    NEED(power_of_two(h.tile) && h.tile >= ROTATION_MIN_BLOCK && h.tile <= BLOCK_MAX,
         "expected blocks of a power of two from ", ROTATION_MIN_BLOCK, " to ", BLOCK_MAX,
         ", got ", h.tile);
}

int64_t element_bytes(uint16_t type, const Header& h) {
  if (type == CODES) return 1;
  return type == SCALES && scales_per_bucket(h.codec) ? value_bytes(h.value_dtype) : 0;
}

void check_lengths(Packet& packet) {
  const Header& h = packet.header;
  packet.k = int64_t(h.numel);
  const Section& codes = need_section(packet, CODES, "codes");
  NEED(codes.length == code_bytes(h), "section type 2: expected ", code_bytes(h), " bytes for ",
       h.numel, " coordinates, got ", codes.length);
  if (const int scales = scales_per_bucket(h.codec)) {
    const Section& section = need_section(packet, SCALES, "scales");
    const int64_t want = scales * buckets(h) * value_bytes(h.value_dtype);
    NEED(section.length == want, "section type 1: expected ", want, " bytes for ", buckets(h),
         " buckets, got ", section.length);
  }
}

// The largest magnitude of a decoded value over the scale, intermediate results included.
double reach(const Header& h) {
  switch (h.codec) {
    case CODEC_UNIFORM: return double(1 << (h.bits - 1));
    case CODEC_AFFINE: return double((1 << h.bits) - 1);
    case CODEC_MINIFLOAT: return MINIFLOAT_LARGEST[h.index];
    case CODEC_TERNARY: return 2.0;
    case CODEC_ROTATED: return 4.0 * h.tile;
    default: return 1.0;
  }
}

float scale_at(const uint8_t* scales, int64_t i, int dtype) {
  const uint32_t bits = dtype == F32 ? get<uint32_t>(scales + 4 * i)
                                     : uint32_t(get<uint16_t>(scales + 2 * i)) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void check_scales(const Packet& packet) {
  const Header& h = packet.header;
  const uint8_t* scales = packet.section(SCALES);
  const int64_t n = buckets(h);
  const double most = reach(h);
  if (h.value_dtype == WIRE_E8M0) {
    const int top = 254 - MINIFLOAT_EMAX[h.index];  // 2^(x - 127) times the largest element is finite
    for (int64_t i = 0; i < n; ++i)
      NEED(scales[i] <= top, "scale ", i, ": expected an exponent up to ", top, ", got ",
           int(scales[i]));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (h.codec == CODEC_AFFINE) {
      const double lo = scale_at(scales, 2 * i, h.value_dtype);
      const float unit = scale_at(scales, 2 * i + 1, h.value_dtype);
      NEED(!std::signbit(unit) && std::fabs(lo) + most * unit <= WIRE_LARGEST, "bucket ", i,
           ": its scales are negative, not finite, or too large");
    } else {
      const float scale = scale_at(scales, i, h.value_dtype);
      NEED(!std::signbit(scale) && most * scale <= WIRE_LARGEST, "bucket ", i,
           ": its scale is negative, not finite, or too large");
    }
  }
}

// Codes of a bucket of n coordinates: a rotated block is filled up to a power of two.
int64_t padded(const Header& h, int64_t n) {
  if (h.codec != CODEC_ROTATED || n == 0) return n;
  int64_t whole = 1;
  while (whole < n) whole *= 2;
  return whole;
}

// Bits of a bucket's last byte that no code uses are zero.
void check_padding(const Packet& packet) {
  const Header& h = packet.header;
  const uint8_t* codes = packet.section(CODES);
  const int64_t stride = bucket_code_bytes(h, h.tile), n = int64_t(h.numel);
  for (int64_t b = 0; b < buckets(h); ++b) {
    const int64_t count = n - b * h.tile < h.tile ? n - b * h.tile : h.tile;
    const int64_t bytes = bucket_code_bytes(h, count);
    const uint8_t last = codes[b * stride + bytes - 1];
    if (h.codec == CODEC_TERNARY && h.index == 1) {
      static const int powers[] = {243, 3, 9, 27, 81};
      for (int64_t i = 0; i < bytes - 1; ++i)
        NEED(codes[b * stride + i] < 243, "bucket ", b, ": a byte of five trits is above 242");
      NEED(last < powers[count % 5], "bucket ", b, ": a trit after its last coordinate is set");
      continue;
    }
    const int used = int((padded(h, count) * h.bits) % 8);
    NEED(used == 0 || last >> used == 0, "bucket ", b,
         ": a bit after its last code is set");
    // all whole buckets are alike: when they end at a byte only the last can have spare bits
    if (h.codec != CODEC_TERNARY && (int64_t(h.tile) * h.bits) % 8 == 0 && b + 2 < buckets(h))
      b = buckets(h) - 2;
  }
}

void check_contents(Packet& packet) {
  const Header& h = packet.header;
  if (h.codec == CODEC_DENSE) {
    NEED(values_finite(packet.section(CODES), packet.k, h.value_dtype), "a value is not finite");
    return;
  }
  if (scales_per_bucket(h.codec)) check_scales(packet);
  check_padding(packet);
}

constexpr Rules rules(const char* name) {
  return {name, &check_header, &element_bytes, &check_lengths, &check_contents};
}

}  // namespace

const Rules BUCKET_RULES[CODEC_COUNT] = {rules("dense"),
                                         {},  // sparse
                                         rules("sign"),
                                         rules("uniform"),
                                         rules("affine"),
                                         rules("natural"),
                                         rules("minifloat"),
                                         rules("ternary"),
                                         rules("rotated"),
                                         {},
                                         {},
                                         {}};

int scales_per_bucket(int codec) {
  return codec == CODEC_DENSE || codec == CODEC_NATURAL ? 0 : codec == CODEC_AFFINE ? 2 : 1;
}

int64_t bucket_code_bytes(const Header& h, int64_t n) {
  if (h.codec == CODEC_TERNARY && h.index == 1) return (n + 4) / 5;
  return (padded(h, n) * h.bits + 7) / 8;
}

int64_t code_bytes(const Header& h) {
  const int64_t n = int64_t(h.numel), whole = n / h.tile;
  return whole * bucket_code_bytes(h, h.tile) + bucket_code_bytes(h, n % h.tile);
}

}  // namespace wire
}  // namespace flcore
