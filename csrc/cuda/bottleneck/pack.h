// Factors as the kernel reads them: in the compute dtype, rows of a multiple of eight elements, zeros behind.
#pragma once

#include <cstdint>

#include "common/view.h"
#include "cuda/common/stream.h"

namespace kronafuse::cuda::bottleneck {

struct PackJob {
  const void* data;
  int64_t stride_row;
  int64_t stride_column;
  DType dtype;
  int rows;
  int columns;
  int padded;  // columns of the target, a multiple of 8
  void* target;
};

// One or two factors in one launch.
void pack(const PackJob* jobs, int count, DType dtype, Stream stream);

}  // namespace kronafuse::cuda::bottleneck
