#include "sparse_emit.h"

#include "check.h"

namespace flcore {

int64_t sparse_emit(const FeedbackArgs& feedback, const SparseEntries& entries,
                    const SparsePacket& packet) {
  wire::Header header = packet.header;
  header.numel = uint64_t(feedback.numel);
  const int64_t tiles = wire::tiles(feedback.numel);
  const wire::Layout layout =
      wire::plan_sparse(header, entries.starts[tiles], packet.tensor_count);
  FLCORE_CHECK(packet.capacity >= layout.total_bytes, "out: expected room for ",
               layout.total_bytes, " bytes, got ", packet.capacity);
  FLCORE_CHECK(feedback.h_new == feedback.h, "h: expected to be changed in place");
  EmitArgs emit;
  emit.entries = entries;
  emit.bitmask = header.index == wire::BITMASK;
  emit.value_dtype = header.value_dtype;
  emit.indices = packet.out + layout.indices_at;
  emit.values = packet.out + layout.values_at;
  cpu().sparsify->emit(feedback, emit);
  wire::write_sparse(layout, entries.starts, packet.tensors, packet.out);
  wire::seal(packet.out, size_t(layout.total_bytes));
  return layout.total_bytes;
}

}  // namespace flcore
