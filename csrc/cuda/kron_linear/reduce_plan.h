// How a factor gradient is cut: the tile of a block, and the parts into which the rows are split.
#pragma once

#include <cstdint>

#include "cuda/common/stream.h"
#include "cuda/kron_linear/reduce_configs.h"

namespace kronafuse::cuda {

struct ReducePlan {
  ReduceForm form = kReduceMedium;
  bool swapped = false;  // q takes p's place: a side up to 16 comes first
  int tiles_p = 0;       // after the swap
  int tiles_q = 0;
  int parts = 0;  // 0 where there are no rows
  int steps_per_part = 0;
};

ReducePlan plan_reduce(int64_t rows, int64_t p, int64_t q, int64_t bytes_per_row, const DeviceInfo& device);

}  // namespace kronafuse::cuda
