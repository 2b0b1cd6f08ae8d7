// y = x Wᵀ + bias + base + s · out_scale ⊙ (A ⊗ B)(in_scale ⊙ x) in one pass over x: torch-free.
#pragma once

#include <cstdint>
#include <optional>

#include "common/view.h"

namespace kronafuse::cuda {

// Features are A-major, i1·I2 + i2 and o1·O2 + o2; on a shuffled side i2·I1 + i1 and o2·O1 + o1, also those of weight,
// bias, base and the scales. x, weight, base and y are of one dtype, fp16 or bf16; factors have it too or are fp32, and
// are rounded to it; bias and scales are of any dtype. Every tensor may have any strides.
struct FatArguments {
  View x;                         // (M, I1·I2)
  std::optional<View> weight;     // (O1·O2, I1·I2)
  std::optional<View> bias;       // (O1·O2,)
  std::optional<View> base;       // (M, O1·O2); may be y itself, element on element
  View a;                         // (O1, I1)
  View b;                         // (O2, I2)
  std::optional<View> in_scale;   // (I1·I2,)
  std::optional<View> out_scale;  // (O1·O2,)
  float scale = 1.0f;
  std::optional<View> scale_tensor;  // 0-d, of any dtype, multiplies `scale`
  bool in_shuffled = false;
  bool out_shuffled = false;
  View y;  // (M, O1·O2)
  void* stream = nullptr;
};

// config: a row of fat_linear_configurations, kFatHopperConfigs plus a row of fat_linear_sm90a_configurations (an error
// where that form cannot serve), or -1 for the one that the rule chooses.
constexpr int kFatHopperConfigs = 100;
void fat_linear(const FatArguments& arguments, int config);

}  // namespace kronafuse::cuda
