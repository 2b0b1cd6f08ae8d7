#include "cuda/kron_linear/reduce_plan.h"

#include <algorithm>

namespace kronafuse::cuda {
namespace {

ReduceForm form_of(int64_t small, int64_t large) {
#ifdef KRONAFUSE_ONE_INSTANCE
  static_cast<void>(small);
  static_cast<void>(large);
  return kReduceMedium;
#else
  if (small <= 16) return large <= 16 ? kReduceTiny : kReduceNarrow;
  return small <= 64 ? kReduceMedium : kReduceWide;
#endif
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

ReducePlan plan_reduce(int64_t rows, int64_t p, int64_t q, int64_t bytes_per_row, const DeviceInfo& device) {
  ReducePlan plan;
  plan.form = form_of(std::min(p, q), std::max(p, q));
  plan.swapped = plan.form <= kReduceNarrow && q < p;
  if (plan.swapped) std::swap(p, q);
  const Configuration& configuration = reduce_configurations[plan.form];
  plan.tiles_p = static_cast<int>(divide_up(p, configuration.tile_m));
  plan.tiles_q = static_cast<int>(divide_up(q, configuration.tile_n));
  if (rows == 0 || p == 0 || q == 0) return plan;

  // As many blocks as fit on the device at once, but at least two steps each, and partial sums of at most half the
  // bytes that are read anyway.
  const int64_t by_registers = plan.form == kReduceWide ? 1 : 3;
  const int64_t by_shared = std::max(1, device.shared_per_block / configuration.shared_bytes);
  const int64_t resident = std::min(by_registers, by_shared);
  const int64_t tiles = int64_t{plan.tiles_p} * plan.tiles_q;
  const int64_t steps = divide_up(rows, configuration.tile_k);
  const int64_t by_blocks = resident * device.multiprocessors / tiles;
  const int64_t by_bytes = rows * bytes_per_row / (8 * p * q);
  const int64_t parts = std::max<int64_t>(1, std::min({by_blocks, steps / 2, by_bytes, int64_t{32768}}));
  plan.steps_per_part = static_cast<int>(divide_up(steps, parts));
  plan.parts = static_cast<int>(divide_up(steps, plan.steps_per_part));
  return plan;
}

}  // namespace kronafuse::cuda
