// out = W + s · (A ⊗ B), streamed: torch-free.
#pragma once

#include <optional>

#include "common/view.h"

namespace kronafuse::cuda {

// B is b, or b · b_down. weight and out are of one dtype, factors each of their own, any of fp64, fp32, bf16 and fp16.
// Every tensor may have any strides. The sum is formed in fp32, in fp64 where weight is fp64, and rounded once.
struct MergeArguments {
  View weight;                  // (N1·N2, K1·K2)
  std::optional<View> a;        // (N1, K1); absent: the 1×1 identity
  View b;                       // (N2, K2), or (N2, R) with b_down
  std::optional<View> b_down;   // (R, K2)
  double scale = 1.0;
  std::optional<View> scale_tensor;  // 0-d, of any dtype, multiplies `scale`
  bool shuffled = false;        // row n2·N1 + n1 of weight and out takes row n1·N2 + n2 of A ⊗ B
  View out;                     // (N1·N2, K1·K2), of memory of its own
  void* stream = nullptr;
};

void merge(const MergeArguments& arguments);

}  // namespace kronafuse::cuda
