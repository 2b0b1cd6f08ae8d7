#include "cuda/kron_linear/contraction_plan.h"

#include <algorithm>

#include "common/check.h"

namespace kronafuse::cuda {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A block's copies on their way, in bytes: 4.3 TB/s over an H200's 132 multiprocessors for 1 µs are 33 KB, and there
// may be one block on each. This and the next by reckoning, not by measurement.
constexpr int64_t kBytesUnderWay = 48 * 1024;
// A split costs a second kernel: it is for blocks that would read more than this alone while others idle.
constexpr int64_t kBytesWorthSplitting = 192 * 1024;

int column_tiles(Neighbours neighbours, int64_t tiles, int& blocks) {
#ifdef KRONAFUSE_ONE_INSTANCE
  const int widths[] = {4};
  (void)neighbours;
#else
  const int widths[] = {2, 4, neighbours == Neighbours::k ? 12 : 4};
#endif
  const int widest = widths[sizeof widths / sizeof *widths - 1];
  blocks = static_cast<int>(ceil_div(tiles, widest));
  const int64_t needed = ceil_div(tiles, blocks);
  for (int width : widths) {
    if (width >= needed) return width;
  }
  return widest;
}

// GPUs with 99 KB of shared memory for a block have a third of the bandwidth for each multiprocessor that those with
// more have, and need as much less of it under way.
bool is_small(const DeviceInfo& device) { return device.shared_per_block < 128 * 1024; }

int tile_k(Neighbours neighbours, int warp_rows, int64_t k, const DeviceInfo& device) {
  if (neighbours == Neighbours::rows) return 16;
  const int64_t line = warp_rows > 16 && is_small(device) ? 32 : 64;
  if (k % line == 0) return static_cast<int>(line);
  const int64_t most = warp_rows > 16 ? line : 96, tiles = std::max<int64_t>(ceil_div(k, most), 1);
  return static_cast<int>(round_up(std::max<int64_t>(ceil_div(k, tiles), 1), 16));
}

// Of shared memory, for one of two blocks on a multiprocessor: each takes 1 KB of the system's.
constexpr int64_t budget_of_two(const DeviceInfo& device) { return device.shared_per_block / 2 - 1024; }

// Blocks that registers let a multiprocessor hold.
constexpr int blocks_together(int column_tiles) { return column_tiles > 4 ? 1 : 2; }

// As much of the factors as fits: all that the block needs, or a part at a time.
bool fit_factors(ContractionPlan& plan, Neighbours neighbours, int64_t budget, bool parts) {
  const int64_t step = int64_t{plan.warps_k} * plan.tile_k;
  const auto bytes = [&](int64_t positions) {
    return contraction_shared_bytes(neighbours, plan.column_tiles, plan.tile_k, plan.stages, plan.warps_k,
                                    positions * step);
  };
  int64_t fitting = plan.positions;
  if (bytes(fitting) > budget) {
    if (!parts) return false;
    fitting = (budget - bytes(0)) / (plan.column_tiles * 16 * step);
    while (fitting > 0 && bytes(fitting) > budget) --fitting;
    if (fitting < 1) return false;
  }
  plan.part_positions = static_cast<int>(fitting);
  plan.factor_pitch = static_cast<int>(contraction_pitch(fitting * step));
  plan.shared_bytes = static_cast<int>(bytes(fitting));
  return true;
}

// How many stages keep enough under way; 3 at least, as what is multiplied is under way no more.
int stages_wanted(const ContractionPlan& plan, Neighbours neighbours, int64_t k) {
  const int64_t rows = contraction_rows(neighbours, plan.column_tiles);
  const int64_t tile_bytes = int64_t{kContractionWarps} * rows * std::min<int64_t>(k, plan.tile_k) * 2;
  const int64_t copies = ceil_div(kBytesUnderWay, std::max<int64_t>(tile_bytes, 1));
  return static_cast<int>(std::clamp<int64_t>(copies + 1, 3, 8));
}

void share_k(ContractionPlan& plan, int warps_k) {
  plan.warps_k = warps_k;
  plan.positions = static_cast<int>(std::max<int64_t>(ceil_div(plan.tiles_per_split, warps_k), 1));
}

// Whether all of a block's factors fit: twice on a multiprocessor, else once.
bool fit_whole(ContractionPlan& plan, Neighbours neighbours, int64_t k, int least_stages, const DeviceInfo& device) {
  const auto fits = [&](int64_t budget, int least) {
    for (plan.stages = stages_wanted(plan, neighbours, k); plan.stages >= least; --plan.stages) {
      if (fit_factors(plan, neighbours, budget, false)) return true;
    }
    return false;
  };
  return fits(budget_of_two(device), 3) || fits(device.shared_per_block, least_stages);
}

// The copies of x wait for each part of the factors: few stages, and as long a part as fits beside them.
void fit_parts(ContractionPlan& plan, Neighbours neighbours, const DeviceInfo& device) {
  plan.stages = 2;
  for (int warps_k = plan.warps_k; warps_k > 0; warps_k /= 2) {
    share_k(plan, warps_k);
    if (fit_factors(plan, neighbours, device.shared_per_block, true)) return;
  }
  KF_CHECK(false, "a contraction with ", plan.column_tiles * 8, " columns of a block needs more than the ",
           device.shared_per_block, " bytes of shared memory that a block of this device has");
}

// Warps that share a row have their block read all of the factors for fewer rows: no more of them than fill the GPU.
int warps_to_a_row(int64_t work, int64_t tiles, int64_t enough) {
  int warps = 1;
  while (warps < kContractionWarps && work * warps * 4 < enough * 3 && tiles >= 4 * warps) warps *= 2;
  return warps;
}

void split(ContractionPlan& plan, int64_t splits) {
  if (splits <= 1) return;
  plan.tiles_per_split = static_cast<int>(ceil_div(plan.tiles, splits));
  plan.splits = static_cast<int>(ceil_div(plan.tiles, plan.tiles_per_split));
}

}  // namespace

ContractionPlan plan_contraction(Neighbours neighbours, int64_t rows, int64_t columns, int64_t k, bool splitting,
                                 const DeviceInfo& device) {
  ContractionPlan plan{};
  plan.column_tiles = column_tiles(neighbours, columns / 8, plan.column_blocks);
  const int warp_rows = contraction_rows(neighbours, plan.column_tiles);
  plan.tile_k = tile_k(neighbours, warp_rows, k, device);
  plan.tiles = static_cast<int>(ceil_div(k, plan.tile_k));
  plan.x_pitch = static_cast<int>(contraction_pitch(neighbours == Neighbours::k ? plan.tile_k : warp_rows));
  plan.stage_bytes = static_cast<int>(contraction_stage_bytes(neighbours, warp_rows, plan.tile_k));
  plan.splits = 1;
  plan.tiles_per_split = plan.tiles;

  const int64_t units = ceil_div(rows, warp_rows);
  const int64_t enough = int64_t{device.multiprocessors} * kContractionWarps;
  plan.warps_k = warps_to_a_row(units * plan.column_blocks, plan.tiles, enough);
  const int64_t sums = int64_t{kContractionWarps} * warp_rows * plan.column_tiles * 8 * 4;
  const int most_warps = sums > device.shared_per_block / 3 ? 1 : kContractionWarps;

  const int64_t blocks = ceil_div(units, plan.groups()) * plan.column_blocks;
  if (splitting && blocks * 2 <= device.multiprocessors) {
    const int64_t block_rows = int64_t{warp_rows} * plan.groups();
    const int64_t bytes = (std::min(block_rows, rows) + plan.column_tiles * 8) * k * 2;
    split(plan, std::min({ceil_div(bytes, kBytesWorthSplitting), device.multiprocessors / blocks,
                          int64_t{plan.tiles} / plan.warps_k}));
  }
  for (;;) {
    const int64_t work = units * plan.column_blocks * plan.splits;
    share_k(plan, std::min(warps_to_a_row(work, plan.tiles_per_split, enough), most_warps));
    if (fit_whole(plan, neighbours, k, is_small(device) ? 2 : 3, device)) break;
    // Partial sums that are a tenth of x cost less than factors that come in parts.
    const int64_t more = plan.splits + 1;
    if (splitting && more * columns * 40 <= k && more <= plan.tiles) {
      split(plan, more);
      continue;
    }
    if (!fit_whole(plan, neighbours, k, 2, device)) fit_parts(plan, neighbours, device);
    break;
  }

  const int resident = plan.shared_bytes <= budget_of_two(device) ? blocks_together(plan.column_tiles) : 1;
  const int64_t room = std::max<int64_t>(
      1, int64_t{device.multiprocessors} * resident / (int64_t{plan.column_blocks} * plan.splits));
  const int64_t row_blocks = ceil_div(units, plan.groups());
  const int64_t rounds = ceil_div(row_blocks, room);
  plan.blocks = static_cast<int>(ceil_div(row_blocks, rounds));
  return plan;
}

}  // namespace kronafuse::cuda
