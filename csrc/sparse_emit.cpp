#include "sparse_emit.h"

#include <cstring>

#include "check.h"
#include "indices.h"

namespace flcore {
namespace {

int64_t plain_bytes(int index, int64_t numel, int64_t k) {
  return index == INDEX_TILE16 ? 2 * k : (numel + 7) / 8;
}

// The index coding of the packet, with its plan when it needs one.
IndexPlan choose_coding(const FeedbackArgs& x, const SparseEntries& entries,
                        const SparsePacket& packet) {
  const auto plan = [&](int coding) {
    return plan_indices(coding, x.numel, entries.starts, entries.local, x.threads);
  };
  const int index = packet.header.index;
  const bool given = packet.choice == INDEX_GIVEN;
  if (given && (index == INDEX_BITPACK || index == INDEX_RICE)) return plan(index);
  IndexPlan best;
  best.coding = index;
  if (given) return best;
  const int64_t k = entries.starts[wire::tiles(x.numel)];
  best.coding = INDEX_TILE16;
  best.bytes = plain_bytes(INDEX_TILE16, x.numel, k);
  if (plain_bytes(INDEX_BITMASK, x.numel, k) < best.bytes) {
    best.coding = INDEX_BITMASK;
    best.bytes = plain_bytes(INDEX_BITMASK, x.numel, k);
  }
  if (packet.choice == INDEX_AUTO) return best;
  for (int coding : {INDEX_BITPACK, INDEX_RICE}) {
    IndexPlan other = plan(coding);
    if (other.bytes < best.bytes) best = std::move(other);
  }
  return best;
}

}  // namespace

int64_t sparse_emit(const FeedbackArgs& feedback, const SparseEntries& entries,
                    const SparsePacket& packet) {
  FLCORE_CHECK(feedback.h_new == feedback.h, "h: expected to be changed in place");
  const IndexPlan indices = choose_coding(feedback, entries, packet);
  wire::Header header = packet.header;
  header.numel = uint64_t(feedback.numel);
  header.index = uint8_t(indices.coding);
  const int64_t tiles = wire::tiles(feedback.numel);
  const wire::Layout layout =
      wire::plan_sparse(header, entries.starts[tiles], packet.tensor_count, indices.bytes);
  FLCORE_CHECK(packet.capacity >= layout.total_bytes, "out: expected room for ",
               layout.total_bytes, " bytes, got ", packet.capacity);
  EmitArgs emit;
  emit.entries = entries;
  emit.index = header.index;
  emit.value_dtype = header.value_dtype;
  emit.scales = packet.out + layout.scales_at;
  emit.indices = packet.out + layout.indices_at;
  emit.values = packet.out + layout.values_at;
  cpu().sparsify->emit(feedback, emit);
  if (indices.coding == INDEX_BITPACK || indices.coding == INDEX_RICE)
    write_indices(indices, feedback.numel, entries.starts, entries.local, feedback.threads,
                  emit.indices);
  wire::write_sparse(layout, entries.starts, packet.tensors, packet.out);
  wire::seal(packet.out, size_t(layout.total_bytes), feedback.threads);
  return layout.total_bytes;
}

int64_t sparse_pack(const SparseSections& x, const SparsePacket& packet) {
  FeedbackArgs update = {};
  update.numel = x.numel;
  update.threads = x.threads;
  const int64_t tiles = wire::tiles(x.numel), k = x.starts[tiles];
  const SparseEntries entries{x.starts, x.local, nullptr, nullptr};
  const IndexPlan indices = choose_coding(update, entries, packet);
  wire::Header header = packet.header;
  header.numel = uint64_t(x.numel);
  header.index = uint8_t(indices.coding);
  const wire::Layout layout = wire::plan_sparse(header, k, packet.tensor_count, indices.bytes);
  FLCORE_CHECK(packet.capacity >= layout.total_bytes, "out: expected room for ",
               layout.total_bytes, " bytes, got ", packet.capacity);
  const auto copy = [&](int64_t to, const void* from, int64_t bytes) {
    if (bytes) std::memcpy(packet.out + to, from, size_t(bytes));
  };
  copy(layout.values_at, x.values, layout.value_bytes * k);
  if (header.value_dtype == WIRE_INT8) copy(layout.scales_at, x.scales, 4 * tiles);
  uint8_t* to = packet.out + layout.indices_at;
  if (header.index == INDEX_TILE16) {
    copy(layout.indices_at, x.local, 2 * k);
  } else if (header.index == INDEX_BITMASK) {
    std::memset(to, 0, size_t(x.numel + 7) / 8);
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t j = x.starts[t]; j < x.starts[t + 1]; ++j) {
        const int64_t i = t * SPARSE_TILE + x.local[j];
        to[i / 8] = uint8_t(to[i / 8] | 1u << (i % 8));
      }
  } else {
    write_indices(indices, x.numel, x.starts, x.local, x.threads, to);
  }
  wire::write_sparse(layout, x.starts, packet.tensors, packet.out);
  wire::seal(packet.out, size_t(layout.total_bytes), x.threads);
  return layout.total_bytes;
}

}  // namespace flcore
