// Several packets of codes at one visit of the accumulator:
//   out[i] = ((out[i] + w_0 D_0[i]) + w_1 D_1[i]) + ..
// each product and each sum rounded: the same bits as one packet after the other. The accumulator,
// rarely aligned to vectors, is loaded and stored once for all of them; what remains is to widen,
// shift and convert the codes, two products and a sum, for 8 bits 0.9 ns a vector of 16.
// The packets of a group have one layout, so that their buckets begin and end together.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/codes.h"
#include "cpu/codes_pack.h"
#include "cpu/decode_linear.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {

static bool is_linear(int codec) {
  return codec == CODEC_SIGN || codec == CODEC_UNIFORM || codec == CODEC_AFFINE ||
         codec == CODEC_TERNARY;
}

// Whether the first n of some packets are linear and decoded by the same steps, with other numbers.
static bool is_group(const PacketView* p, int64_t n) {
  if (!is_linear(p->codec)) return false;
  for (int64_t i = 1; i < n; ++i)
    if (p[i].codec != p->codec || p[i].bits != p->bits || p[i].form != p->form ||
        p[i].bucket != p->bucket)
      return false;
  return true;
}

// What is different from packet to packet in a segment.
template <int N>
struct GroupCodes {
  const uint8_t* codes[N];
  float first[N], second[N];  // scales
  float weight[N];
};

#if defined(__AVX512F__)
// The first n <= LANES lanes; the others are 0, and not written.
FLCORE_INLINE __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1); }
FLCORE_INLINE vf32 load_some(const float* x, __mmask16 lanes) {
  return (vf32)_mm512_maskz_loadu_ps(lanes, x);
}
FLCORE_INLINE void store_some(float* x, __mmask16 lanes, const vf32& v) {
  _mm512_mask_storeu_ps(x, lanes, (__m512)v);
}
FLCORE_INLINE vi32 some_code_numbers(const uint8_t* codes, __mmask16 lanes) {
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes, codes);
  return (vi32)_mm512_maskz_cvtepu8_epi32(__mmask16(0xffff), bytes);
}
#endif

// n codes, one a byte. AFFINE: D = first + second code, else first (code - middle)
template <bool AFFINE, int N>
static void add_codes(const GroupCodes<N>& group, int64_t n, int middle, float* out) {
  vf32 unit[N], lo[N], weight[N];  // spread before the loop: compilers do not
  const uint8_t* codes[N];
  unroll<N>([&](auto k) FLCORE_LAMBDA {
    constexpr int g = k.value;
    unit[g] = vf32{} + (AFFINE ? group.second[g] : group.first[g]);
    lo[g] = vf32{} + group.first[g];
    weight[g] = vf32{} + group.weight[g];
    codes[g] = group.codes[g];
  });
  const auto added = [&](vf32 sum, const auto& numbers) FLCORE_LAMBDA {
    unroll<N>([&](auto k) FLCORE_LAMBDA {
      constexpr int g = k.value;
      const vi32 code = numbers(codes[g]);
      const vf32 d = unit[g] * __builtin_convertvector(AFFINE ? code : code - middle, vf32);
      sum = sum + weight[g] * (AFFINE ? lo[g] + d : d);
    });
    return sum;
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    store(out + i, added(load<vf32>(out + i), [&](const uint8_t* c) FLCORE_LAMBDA {
            return code_numbers(c + i);
          }));
#if defined(__AVX512F__)
  if (const __mmask16 rest = first_lanes(n - i))
    store_some(out + i, rest,
               added(load_some(out + i, rest), [&](const uint8_t* c) FLCORE_LAMBDA {
                 return some_code_numbers(c + i, rest);
               }));
#else
  for (; i < n; ++i) {
    float sum = load<float>(out + i);
    for (int g = 0; g < N; ++g) {
      const float d = unit[g][0] * float(codes[g][i] - (AFFINE ? 0 : middle));
      sum = sum + group.weight[g] * (AFFINE ? group.first[g] + d : d);
    }
    store(out + i, sum);
  }
#endif
}

#if defined(__AVX512F__)
// Codes of 4 bits from coordinate `begin` of their bucket on. Even and odd coordinates are summed
// apart, as the codes come, and take turns again at the end.
template <bool AFFINE, int N>
static void add_nibbles(const GroupCodes<N>& group, int64_t begin, int64_t n, float* out) {
  float table[N][16];  // weight times D of every code
  vf32 values[N];
  unroll<N>([&](auto k) FLCORE_LAMBDA {
    constexpr int g = k.value;
    if constexpr (AFFINE)
      fill_table(AffinePoint{group.first[g], group.second[g]}, group.weight[g], table[g]);
    else
      fill_table(SymmetricPoint{group.first[g], 7.0f}, group.weight[g], table[g]);
    values[g] = load<vf32>(table[g]);
  });
  int64_t i = 0;
  if (n > 0 && begin % 2) {
    float sum = load<float>(out);
    for (int g = 0; g < N; ++g) sum = sum + table[g][group.codes[g][begin / 2] >> 4];
    store(out, sum);
    i = 1;
  }
  const NibbleOrder order;
  const auto add = [&](vf32& low, vf32& high, const auto& numbers) FLCORE_LAMBDA {
    vf32 even = shuffle_two(low, high, order.even);
    vf32 odd = shuffle_two(low, high, order.odd);
    unroll<N>([&](auto k) FLCORE_LAMBDA {
      constexpr int g = k.value;
      const vi32 code = numbers(group.codes[g] + (begin + i) / 2);
      even = even + look_up(values[g], code);
      odd = odd + look_up(values[g], code >> 4);
    });
    low = shuffle_two(even, odd, order.first);
    high = shuffle_two(even, odd, order.second);
  };
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    vf32 low = load<vf32>(out + i), high = load<vf32>(out + i + LANES);
    add(low, high, [](const uint8_t* c) FLCORE_LAMBDA { return code_numbers(c); });
    store(out + i, low);
    store(out + i + LANES, high);
  }
  if (const int64_t rest = n - i; rest > 0) {
    const __mmask16 bytes = first_lanes((rest + 1) / 2);
    const __mmask16 first = first_lanes(rest < LANES ? rest : LANES);
    const __mmask16 second = first_lanes(rest < LANES ? 0 : rest - LANES);
    vf32 low = load_some(out + i, first), high = load_some(out + i + LANES, second);
    add(low, high,
        [&](const uint8_t* c) FLCORE_LAMBDA { return some_code_numbers(c, bytes); });
    store_some(out + i, first, low);
    store_some(out + i + LANES, second, high);
  }
}
#endif

// Codes of 1 bit, signs, from coordinate `begin` of their bucket on.
template <int N>
static void add_signs(const GroupCodes<N>& group, int64_t begin, int64_t n, float* out) {
  float size[N];  // the product of w and -a is that of w and a with the other sign
  vi32 sizes[N];
  unroll<N>([&](auto k) FLCORE_LAMBDA {
    size[k.value] = group.weight[k.value] * group.first[k.value];
    sizes[k.value] = vi32{} + int32_t(bits_of(size[k.value]));
  });
  int64_t i = 0;
  const auto one = [&] {
    float sum = load<float>(out + i);
    for (int g = 0; g < N; ++g) {
      const bool minus = (group.codes[g][(begin + i) / 8] >> ((begin + i) % 8)) & 1;
      sum = sum + (minus ? -size[g] : size[g]);
    }
    store(out + i, sum);
    ++i;
  };
  while (i < n && (begin + i) % 8) one();
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; k += LANES) {
      vf32 sum = load<vf32>(out + i + k);
      unroll<N>([&](auto j) FLCORE_LAMBDA {
        constexpr int g = j.value;
        sum = sum + (vf32)(sizes[g] ^ lane_signs(group.codes[g] + (begin + i + k) / 8, k % 8));
      });
      store(out + i + k, sum);
    }
  while (i < n) one();
}

// N packets of a group; a segment of at most BLOCK_MAX coordinates. bytes: [N * CODE_BYTES]
template <int N>
static void add_group(const PacketView* packets, const Segment& s, float* out, uint8_t* bytes) {
  const PacketView& p = packets[0];
  const bool affine = p.codec == CODEC_AFFINE, nibbles = p.bits == 4 && takes_nibbles(p.codec);
  GroupCodes<N> group;
  for (int g = 0; g < N; ++g) {
    const uint8_t* scales = s.scales(packets[g]);
    group.first[g] = load_scale(scales, 0, packets[g].value_dtype);
    group.second[g] = affine ? load_scale(scales, 1, packets[g].value_dtype) : 0.0f;
    group.weight[g] = float(packets[g].weight);
    group.codes[g] = s.codes(packets[g]);
    if (p.codec != CODEC_SIGN && !nibbles)
      group.codes[g] = whole_codes(packets[g], s, bytes + g * CODE_BYTES);
  }
  if (p.codec == CODEC_SIGN) return add_signs(group, s.begin, s.n, out);
#if defined(__AVX512F__)
  if (nibbles && affine) return add_nibbles<true>(group, s.begin, s.n, out);
  if (nibbles) return add_nibbles<false>(group, s.begin, s.n, out);
#endif
  if (affine) return add_codes<true>(group, s.n, 0, out);
  add_codes<false>(group, s.n, middle_code(p), out);
}

}  // namespace FLCORE_ISA
}  // namespace flcore
