// The bottleneck on a CPU: torch's products (cpu/common/gemm.h) and native passes between them, one call each way.
#pragma once

#include <optional>

#include "common/view.h"

namespace kronafuse::cpu::bottleneck {

struct ForwardCall {
  View x;                         // (M, K)  any dtype, any strides
  std::optional<View> residual;   // (M, N)  any dtype, any strides
  View down;                      // (H, K)  any dtype, any strides; rounded to pre's dtype
  View up;                        // (N, H)
  std::optional<View> down_bias;  // (H,)
  std::optional<View> up_bias;    // (N,)
  std::optional<View> scale;      // 0-d
  double scale_number;
  int64_t activation;
  View y;    // (M, N) contiguous
  View pre;  // (M, H) contiguous, float32 or bfloat16: the compute dtype; empty where it is not kept
};

// y = residual + s · (act(x · downᵀ + down_bias) · upᵀ + up_bias).
void forward(const ForwardCall& call);

struct BackwardCall {
  View dy;                      // (M, N)  any dtype, any strides
  std::optional<View> x;        // (M, K)  where ddown is asked for
  View pre;                     // (M, H)  contiguous in the compute dtype; empty where nothing but dup_bias is asked for
  View down;                    // as above
  View up;
  std::optional<View> up_bias;  // where dscale is asked for
  std::optional<View> scale;
  double scale_number;
  int64_t activation;
  bool adds_dy;  // dx = dpre · down + dy
  std::optional<View> dx;          // (M, K) contiguous
  std::optional<View> ddown;       // (H, K) contiguous
  std::optional<View> dup;         // (N, H) contiguous
  std::optional<View> ddown_bias;  // (H,)
  std::optional<View> dup_bias;    // (N,)
  std::optional<View> dscale;      // 0-d
};

// The gradients that have a place to go to.
void backward(const BackwardCall& call);

}  // namespace kronafuse::cpu::bottleneck
