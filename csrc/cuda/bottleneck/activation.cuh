// The activations and their derivatives, on fp32 values.
#pragma once

#include <cmath>

#include "cuda/common/platform.cuh"

namespace kronafuse::cuda::bottleneck {

// The numbers that kronafuse/ops/bottleneck/activation_numbers.py gives them.
enum Activation : int { IDENTITY = 0, RELU = 1, SIGMOID = 2, SILU = 3, GELU = 4 };
constexpr int ACTIVATION_COUNT = 5;

KF_DEVICE float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// Φ(value), the normal distribution; by erfc, whose relative accuracy holds where it is small.
KF_DEVICE float normal(float value) { return 0.5f * erfcf(value * -0.70710678118654752f); }

KF_DEVICE float activate(float pre, int activation) {
  switch (activation) {
    case RELU:
      // Not the maximum: NaN stays NaN.
      return pre <= 0.0f ? 0.0f : pre;
    case SIGMOID:
      return sigmoid(pre);
    case SILU:
      return pre * sigmoid(pre);
    case GELU:
      return pre * normal(pre);
    default:
      return pre;
  }
}

// act'(pre); at 0 relu's is 0.
KF_DEVICE float derivative(float pre, int activation) {
  switch (activation) {
    case RELU:
      return pre <= 0.0f ? 0.0f : 1.0f;
    case SIGMOID: {
      const float gate = sigmoid(pre);
      return gate * (1.0f - gate);
    }
    case SILU: {
      const float gate = sigmoid(pre);
      return gate * (1.0f + pre * (1.0f - gate));
    }
    case GELU:
      return normal(pre) + pre * 0.39894228040143268f * expf(-0.5f * pre * pre);
    default:
      return 1.0f;
  }
}

}  // namespace kronafuse::cuda::bottleneck
