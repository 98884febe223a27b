// A section of coded indices begins with the parameters of its tiles, so that their places are known
// without a look at the codes.
//   bitpack  u8 width of each group of 128 gaps (tile after tile, no group crosses a tile); the groups
//   rice     u16 bytes of each tile, u8 parameter of each tile; the tiles
#include "indices.h"

#include "check.h"
#include "wire_rules.h"

namespace flcore {
namespace {

#define NEED FLCORE_NEED

int64_t group_count(int64_t entries) { return (entries + INDEX_GROUP - 1) / INDEX_GROUP; }

IndexPlan empty_plan(int coding, int64_t tiles, const int64_t* starts) {
  IndexPlan plan;
  plan.coding = coding;
  plan.at.assign(size_t(tiles) + 1, 0);
  int64_t parameters = tiles;
  if (coding == INDEX_BITPACK) {
    plan.groups.assign(size_t(tiles) + 1, 0);
    for (int64_t t = 0; t < tiles; ++t)
      plan.groups[size_t(t) + 1] =
          plan.groups[size_t(t)] + group_count(starts[t + 1] - starts[t]);
    parameters = plan.groups.back();
  }
  plan.parameters.assign(size_t(parameters), 0);
  plan.at[0] = coding == INDEX_RICE ? 3 * tiles : parameters;
  return plan;
}

constexpr int64_t ALONE = 1 << 18;  // fewer entries are coded before a team of threads is awake

IndexArgs arguments(const IndexPlan& plan, int64_t numel, const int64_t* starts, int threads) {
  if (starts[wire::tiles(numel)] < ALONE) threads = 1;
  return {numel,
          plan.coding,
          starts,
          plan.groups.data(),
          const_cast<uint8_t*>(plan.parameters.data()),
          plan.at.data(),
          threads};
}

void read_rice_head(const uint8_t* section, int64_t tiles, const int64_t* starts,
                    IndexPlan& plan) {
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t length = wire::get<uint16_t>(section + 2 * t);
    const int parameter = section[2 * tiles + t];
    NEED(length <= RICE_BYTES_MAX, "indices of tile ", t, ": expected at most ", RICE_BYTES_MAX,
         " bytes, got ", length);
    NEED(parameter <= RICE_PARAMETER_MAX, "indices of tile ", t, ": expected a parameter of at ",
         "most ", RICE_PARAMETER_MAX, ", got ", parameter);
    NEED(parameter == 0 || starts[t] < starts[t + 1], "indices of tile ", t,
         ": a parameter without entries");
    plan.parameters[size_t(t)] = uint8_t(parameter);
    plan.at[size_t(t) + 1] = plan.at[size_t(t)] + length;
  }
}

void read_bitpack_head(const uint8_t* section, int64_t tiles, const int64_t* starts,
                       IndexPlan& plan) {
  const uint8_t* width = section;
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t at = plan.at[size_t(t)];
    for (int64_t left = starts[t + 1] - starts[t]; left > 0; left -= INDEX_GROUP, ++width) {
      NEED(*width <= INDEX_WIDTH_MAX, "indices of tile ", t, ": expected a width of at most ",
           INDEX_WIDTH_MAX, " bits, got ", int(*width));
      at += ((left < INDEX_GROUP ? left : INDEX_GROUP) * *width + 7) / 8;
    }
    plan.at[size_t(t) + 1] = at;
  }
  plan.parameters.assign(section, width);
}

}  // namespace

IndexPlan plan_indices(int coding, int64_t numel, const int64_t* starts, const uint16_t* local,
                       int threads) {
  const int64_t tiles = wire::tiles(numel);
  IndexPlan plan = empty_plan(coding, tiles, starts);
  cpu().indices->measure(arguments(plan, numel, starts, threads), local, plan.at.data() + 1);
  for (size_t t = 0; t < size_t(tiles); ++t) plan.at[t + 1] += plan.at[t];
  plan.bytes = plan.at.back();
  return plan;
}

void write_indices(const IndexPlan& plan, int64_t numel, const int64_t* starts,
                   const uint16_t* local, int threads, uint8_t* out) {
  const int64_t tiles = wire::tiles(numel);
  uint8_t* parameters = out;
  if (plan.coding == INDEX_RICE) {
    for (int64_t t = 0; t < tiles; ++t)
      wire::put<uint16_t>(out + 2 * t, uint16_t(plan.at[size_t(t) + 1] - plan.at[size_t(t)]));
    parameters += 2 * tiles;
  }
  if (!plan.parameters.empty())
    std::memcpy(parameters, plan.parameters.data(), plan.parameters.size());
  cpu().indices->encode(arguments(plan, numel, starts, threads), local, out);
}

void read_indices(int coding, int64_t numel, const int64_t* starts, const uint8_t* section,
                  int64_t bytes, int threads, uint16_t* local) {
  const int64_t tiles = wire::tiles(numel);
  int64_t head = 3 * tiles;
  if (coding == INDEX_BITPACK) {
    head = 0;
    for (int64_t t = 0; t < tiles; ++t) head += group_count(starts[t + 1] - starts[t]);
  }
  NEED(bytes >= head, "indices: expected at least ", head, " bytes for ", tiles, " tiles, got ",
       bytes);
  IndexPlan plan = empty_plan(coding, tiles, starts);
  if (coding == INDEX_RICE)
    read_rice_head(section, tiles, starts, plan);
  else
    read_bitpack_head(section, tiles, starts, plan);
  NEED(plan.at.back() == bytes, "indices: expected ", plan.at.back(), " bytes, got ", bytes);
  const IndexFault fault =
      cpu().indices->decode(arguments(plan, numel, starts, threads), section, local);
  const auto where = [&] { return text("indices of tile ", fault.tile, ": "); };
  NEED(fault.kind != INDEX_BEYOND, where(), "a coordinate beyond the tile");
  NEED(fault.kind != INDEX_LENGTH, where(), "the codes do not end with its bytes");
  NEED(fault.kind != INDEX_PADDING, where(), "a pad bit is set");
  NEED(fault.kind != INDEX_WIDE, where(), "a width larger than its gaps need");
}

}  // namespace flcore
