// The bottleneck's kernels, free of torch: y = residual + s · (act(x · downᵀ + down_bias) · upᵀ + up_bias) and its backward.
#pragma once

#include <optional>

#include "common/view.h"
#include "cuda/common/stream.h"

namespace kronafuse::cuda::bottleneck {

struct ForwardCall {
  View x;                        // (M, K)  any dtype, any strides
  std::optional<View> residual;  // (M, N)  any dtype, any strides
  View down;                     // (H, K)  any dtype, any strides; rounded to pre's dtype
  View up;                       // (N, H)
  std::optional<View> down_bias;  // (H,)
  std::optional<View> up_bias;    // (N,)
  std::optional<View> scale;      // 0-d
  double scale_number;
  int64_t activation;
  int64_t config;                  // row of TILES, or -1
  std::optional<View> packed;  // factors that the kernel cannot read as they are go here; packed_elements of pre's dtype
  View y;                      // (M, N) contiguous
  View pre;                    // (M, H) contiguous in the compute dtype; empty where it is not kept
};

struct BackwardCall {
  View dy;    // (M, N)  any dtype, any strides
  View pre;   // (M, H)  contiguous in the compute dtype
  View down;  // as above
  View up;
  std::optional<View> scale;
  double scale_number;
  int64_t activation;
  bool adds_dy;  // dx = dpre · down + dy
  bool scales_bias;  // whether dup_bias is times the scale
  int64_t config;
  std::optional<View> packed;
  std::optional<View> sums;        // sums_elements of float32, where a bias' gradient is asked for
  std::optional<View> dx;          // (M, K) contiguous
  std::optional<View> hidden;      // (M, H) contiguous in the compute dtype: act(pre)
  std::optional<View> dpre;        // (M, H) contiguous in the compute dtype
  std::optional<View> ddown_bias;  // (H,)
  std::optional<View> dup_bias;    // (N,)
};

void forward(const ForwardCall& call, Stream stream);
void backward(const BackwardCall& call, Stream stream);

}  // namespace kronafuse::cuda::bottleneck
