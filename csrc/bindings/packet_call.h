// Packets in the place of rows, as Python hands them over.
#pragma once

#include <cstdint>
#include <vector>

#include "api.h"
#include "bindings/combine_call.h"
#include "check.h"
#include "wire.h"

namespace flcore {

using Packets = std::vector<const wire::Packet*>;

// Views of packets that hold as many coordinates as all layers together, which are float32. They
// get `weights`, if there is one for each.
inline PacketTable packet_table(const Packets& packets, const Addresses& rows,
                                const std::vector<int64_t>& numel, const std::vector<int>& dtype,
                                const std::vector<double>& weights = {}) {
  PacketTable table;
  if (packets.empty()) return table;
  FLCORE_CHECK(rows.empty(), "rows: expected none beside packets");
  FLCORE_CHECK(dtype.size() == numel.size(), "dtype: expected ", numel.size(), " codes, got ",
               dtype.size());
  for (int d : dtype) FLCORE_CHECK(d == F32, "dtype: packets are rows of float32, got code ", d);
  table.starts.push_back(0);
  for (int64_t count : numel) {
    FLCORE_CHECK(count >= 0 && count <= int64_t(wire::HARD_MAX_NUMEL), "numel: got ", count);
    table.starts.push_back(table.starts.back() + count);
  }
  for (size_t i = 0; i < packets.size(); ++i) {
    table.views.push_back(packets[i]->view(weights.size() == packets.size() ? weights[i] : 1.0));
    FLCORE_CHECK(table.views[i].numel == table.starts.back(), "packets[", i, "]: holds ",
                 table.views[i].numel, " coordinates, the layers ", table.starts.back());
  }
  return table;
}

}  // namespace flcore
