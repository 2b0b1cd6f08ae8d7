// Second stage of the biases' gradients: sums over the blocks of rows, in a fixed order.
#pragma once

#include <cstdint>

#include "common/view.h"
#include "cuda/bottleneck/arguments.h"
#include "cuda/common/stream.h"

namespace kronafuse::cuda::bottleneck {

struct SumsJob {
  const float* partial;  // (blocks, columns)
  int columns;
  Vector scale;
  float scale_number;
  void* out;  // (columns,)
  int64_t out_stride;
  DType out_dtype;
};

// out = scale · Σ over the blocks; one or two of them in one launch.
void sum_blocks(const SumsJob* jobs, int count, int64_t blocks, Stream stream);

}  // namespace kronafuse::cuda::bottleneck
