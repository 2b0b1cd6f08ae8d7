// The dense forms of thin maps, built from the factors at each call: torch-free.
#pragma once

#include <cstdint>
#include <optional>

#include "common/view.h"

namespace kronafuse::cuda {

// out (features, width), a feature being (f1, f2) of `left` × `right` and a column (t1, t2):
//   mixes      A ⊗ I   factor (left, J)   width J·right   factor[f1, t1] where f2 = t2
//   otherwise  I ⊗ B   factor (right, J)  width left·J    factor[f2, t2] where f1 = t1
// L is `out` as it is; D, with T's columns as rows, is built through its transpose.
struct BuildArguments {
  View factor;  // fp16, bf16, fp32 or fp64, any strides
  bool mixes = false;
  int64_t left = 1, right = 1;
  bool shuffled = false;              // feature f2·left + f1 instead of f1·right + f2
  std::optional<View> feature_scale;  // (features,)  multiplies before the one rounding
  View out;                           // fp16 or bf16, any strides
  void* stream = nullptr;
};

void build(const BuildArguments& arguments);

}  // namespace kronafuse::cuda
