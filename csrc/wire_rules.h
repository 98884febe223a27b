// What a codec asks of its packets: one row of functions a codec. Everything here is called on
// bytes that nobody has checked yet, in the order of the members.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "check.h"
#include "wire.h"

#define FLCORE_NEED(condition, ...)                                                  \
  do {                                                                               \
    if (!(condition)) throw PacketError(::flcore::text("packet: ", __VA_ARGS__));    \
  } while (0)

namespace flcore {
namespace wire {

struct Rules {
  const char* name;
  // Value dtype, form, bits and tile are ones the codec knows.
  void (*header)(const Header& header);
  // Bytes of an element of a section type, 0 when the codec has no such section.
  int64_t (*element)(uint16_t type, const Header& header);
  // Sections are there, with the lengths that header and tensor table ask for; sets packet.k. Only
  // lengths may be looked at: the checksum has not been checked. May not allocate.
  void (*lengths)(Packet& packet);
  // Everything in the sections decodes to finite values. The checksum was right.
  void (*contents)(Packet& packet);
};

extern const Rules SPARSE_RULES;                // wire_sparse.cpp
extern const Rules LOW_RANK_RULES;              // wire_low_rank.cpp
extern const Rules SKETCH_RULES;                // wire_sketch.cpp
extern const Rules THC_RULES;                   // wire_thc.cpp
extern const Rules BUCKET_RULES[CODEC_COUNT];   // wire_bucket.cpp; name is null for other codecs

template <class T>
T get(const uint8_t* p) {
  T v = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  std::memcpy(&v, p, sizeof(T));  // what the loop says, in a form that loops over it vectorise
#else
  for (size_t i = 0; i < sizeof(T); ++i) v = T(v | T(T(p[i]) << (8 * i)));
#endif
  return v;
}

template <class T>
void put(uint8_t* p, T v) {
  for (size_t i = 0; i < sizeof(T); ++i) p[i] = uint8_t(v >> (8 * i));
}

inline bool all_zero(const uint8_t* p, int64_t bytes) {
  uint8_t any = 0;
  for (int64_t i = 0; i < bytes; ++i) any |= p[i];
  return any == 0;
}

// largest: bits of the largest finite value
template <class T>
bool values_finite(const uint8_t* values, int64_t k, int32_t largest) {
  const T magnitude = T(T(-1) >> 1);
  int32_t room = 0;  // negative when any value is NaN or infinite
  for (int64_t j = 0; j < k; ++j)
    room |= largest - int32_t(get<T>(values + int64_t(sizeof(T)) * j) & magnitude);
  return room >= 0;
}

// k values of a floating dtype
inline bool values_finite(const uint8_t* values, int64_t k, int dtype) {
  return dtype == F32   ? values_finite<uint32_t>(values, k, 0x7f7fffff)
         : dtype == F16 ? values_finite<uint16_t>(values, k, 0x7bff)
                        : values_finite<uint16_t>(values, k, 0x7f7f);
}

// A section that must be there.
inline const Section& need_section(const Packet& packet, uint16_t type, const char* what) {
  const Section* found = packet.frame.find(type);
  FLCORE_NEED(found, "section type ", type, " (", what, ") is missing");
  return *found;
}

}  // namespace wire
}  // namespace flcore
