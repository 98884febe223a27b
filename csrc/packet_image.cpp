#include "packet_image.h"

#include <cstring>

#include "api.h"

namespace flcore {
namespace {

constexpr int64_t ALIGN = 16;

int64_t align_up(int64_t x) { return (x + ALIGN - 1) / ALIGN * ALIGN; }

bool one_by_one(int codec) {
  switch (codec) {
    case CODEC_DENSE:
    case CODEC_SIGN:
    case CODEC_UNIFORM:
    case CODEC_AFFINE:
    case CODEC_NATURAL:
    case CODEC_MINIFLOAT:
    case CODEC_TERNARY: return true;
    default: return false;
  }
}

// What a packet of these coordinates looks like when its values are stored as float32.
PacketView dense_view(const PacketView& p) {
  PacketView v = {};
  v.codec = CODEC_DENSE;
  v.bits = 32;
  v.value_dtype = F32;
  v.weight = p.weight;
  v.numel = p.numel;
  v.bucket = BUCKET_MAX;
  v.k = p.numel;
  v.code_stride = 4 * BUCKET_MAX;
  return v;
}

void decode(const PacketView& p, uint8_t* data, int threads) {
  const int64_t starts[] = {0, p.numel};
  const int dtype = F32;
  void* const out = data;
  cpu().decode->dense({p.numel, 1, &p, 1, starts, &dtype, &out, threads});
}

}  // namespace

PacketImage::PacketImage(const std::vector<const wire::Packet*>& packets,
                         const std::vector<double>& weights, int threads)
    : threads_(threads) {
  nbytes_ = align_up(int64_t(packets.size() * sizeof(PacketView)));
  for (size_t i = 0; i < packets.size(); ++i) add(*packets[i], weights[i]);
}

PacketImage::Section PacketImage::place(const void* from, int64_t length) {
  const Section section{from, nbytes_, length};
  nbytes_ += align_up(length);
  return section;
}

void PacketImage::add(const wire::Packet& packet, double weight) {
  Item item = {packet.view(weight), {}, {}, {}, {}, {}};
  const PacketView& v = item.view;
  if (v.codec == CODEC_SPARSE) {
    item.starts = place(v.starts, 8 * (wire::tiles(v.numel) + 1));
    item.indices = place(v.indices, v.bitmask ? (v.numel + 7) / 8 : 2 * v.k);
    item.values = place(v.values, packet.frame.length(wire::VALUES));
    item.scales = place(v.scales, packet.frame.length(wire::SCALES));
  } else if (one_by_one(v.codec)) {
    item.scales = place(v.scales, packet.frame.length(wire::SCALES));
    item.codes = place(v.codes, packet.frame.length(wire::CODES));
  } else {
    item.codes = place(nullptr, 4 * v.numel);
    ++decoded_;
  }
  items_.push_back(item);
}

void PacketImage::write(uint8_t* data, uintptr_t base) const {
  std::memset(data, 0, size_t(align_up(packets() * int64_t(sizeof(PacketView)))));
  const auto put = [&](const Section& s) {
    if (s.from && s.length) std::memcpy(data + s.at, s.from, size_t(s.length));
    std::memset(data + s.at + s.length, 0, size_t(align_up(s.length) - s.length));
  };
  for (size_t i = 0; i < items_.size(); ++i) {
    const Item& item = items_[i];
    PacketView view = item.view;
    if (view.codec != CODEC_SPARSE && !one_by_one(view.codec)) {
      decode(item.view, data + item.codes.at, threads_);
      view = dense_view(item.view);
    }
    const auto bytes = [&](const Section& s) {
      return reinterpret_cast<const uint8_t*>(base + uintptr_t(s.at));
    };
    for (const Section* s : {&item.scales, &item.codes, &item.indices, &item.values, &item.starts})
      if (s->at) put(*s);
    view.scales = bytes(item.scales);
    view.codes = bytes(item.codes);
    view.indices = bytes(item.indices);
    view.values = bytes(item.values);
    view.starts = reinterpret_cast<const int64_t*>(bytes(item.starts));
    view.codebook = view.norm = view.factor_p = view.factor_q = nullptr;
    view.matrices = nullptr;
    view.matrix_count = 0;
    std::memcpy(data + i * sizeof(PacketView), &view, sizeof view);
  }
}

}  // namespace flcore
