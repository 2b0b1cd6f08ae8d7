// Factor gradients: out (P, Q) = s · Σ_{m,g} (p_scale[g] · p[m, g])ᵀ q[m, g], in fp32 and always in the same order.
#pragma once

#include <cstdint>
#include <optional>

#include "common/view.h"
#include "cuda/common/stream.h"

namespace kronafuse::cuda {

// p and q have one dtype, fp16 or bf16; or one of them is fp32 and is rounded to the other's as it is read.
struct ReduceArguments {
  View p;                            // (M, G, P), any strides
  View q;                            // (M, G, Q), any strides
  std::optional<View> p_scale;       // (G, P), any dtype and strides; the product with p is rounded to p's dtype
  double scale = 1.0;
  std::optional<View> scale_tensor;  // 0-d, any dtype
  View workspace;                    // fp32, contiguous, at least reduce_workspace(p, q) elements
  View out;                          // (P, Q), any dtype and strides
  Stream stream = nullptr;
};

// Elements of the workspace: the partial sums that the first stage leaves. Depends on the current device.
int64_t reduce_workspace(const View& p, const View& q);

void reduce(const ReduceArguments& arguments);

}  // namespace kronafuse::cuda
