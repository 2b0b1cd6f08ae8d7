// weight + scale · (A ⊗ B) by rows: what a kernel of each level is given.
#pragma once

#include "cpu/common/level.h"
#include "cpu/common/operand.h"

namespace kronafuse::cpu {

struct MergeJob {
  Operand weight, out;        // (N, K), strides of the first two dimensions; out's second is 1
  bool is_bf16, shuffled;
  int64_t n1, k1, n2, k2;
  const float *left, *right;  // dense
  float scale;
};

// Rows [begin, end) of out.
KF_DECLARE_KERNEL(void, merge_rows, const MergeJob&, int64_t begin, int64_t end)

}  // namespace kronafuse::cpu
