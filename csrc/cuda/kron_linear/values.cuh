// A value for each feature, of any floating dtype: biases and row scales.
#pragma once

#include "cuda/common/scale.cuh"

namespace kronafuse::cuda {

// Absent where data is null.
struct Values {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;

  KF_DEVICE float operator()(int64_t feature) const { return load_number(data, feature * stride, dtype); }
};

}  // namespace kronafuse::cuda
