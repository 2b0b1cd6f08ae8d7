// Σ over tokens of p ⊙ q: what a kernel of each level is given.
#pragma once

#include "cpu/common/level.h"
#include "cpu/common/operand.h"

namespace kronafuse::cpu {

struct ColumnsJob {
  Operand p, q;  // (M, N), strides of the first two dimensions; q's data null where absent
  bool is_bf16;
  int64_t tokens, columns;
  int64_t slices, slice_tokens;
  int64_t parts, part_columns;
  float* partial;  // [slices][N]
};

// Units [begin, end) of slices · parts.
KF_DECLARE_KERNEL(void, columns_units, const ColumnsJob&, int64_t begin, int64_t end)

}  // namespace kronafuse::cpu
