// Checked packets as one block of bytes that can be moved to the memory of a device.
#pragma once

#include <cstdint>
#include <vector>

#include "wire.h"

namespace flcore {

// An image is PacketView [packets], then the sections these point to, each at a multiple of 16 bytes
// and followed by zeros up to the next. Packets are sparse (16-bit indices or a bitmask) or of the
// codecs whose coordinates can be decoded one by one: dense, sign, uniform, affine, natural,
// minifloat, ternary. Any other packet becomes a dense one of float32, decoded here: the same values.
class PacketImage {
 public:
  // The packets must stay alive and unchanged.
  PacketImage(const std::vector<const wire::Packet*>& packets, const std::vector<double>& weights,
              int threads);

  int64_t nbytes() const { return nbytes_; }
  int64_t packets() const { return int64_t(items_.size()); }
  int64_t decoded() const { return decoded_; }  // packets that become dense ones

  // Fills data[nbytes]; `base` is the address that the bytes will have, a multiple of 16.
  void write(uint8_t* data, uintptr_t base) const;

 private:
  struct Section {
    const void* from;  // null: decoded
    int64_t at, length;
  };
  struct Item {
    PacketView view;
    Section scales, codes, indices, values, starts;
  };

  Section place(const void* from, int64_t length);
  void add(const wire::Packet& packet, double weight);

  std::vector<Item> items_;
  int64_t nbytes_ = 0, decoded_ = 0;
  int threads_;
};

}  // namespace flcore
