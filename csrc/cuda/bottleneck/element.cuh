// Single elements of a dtype known at run time: for what is too small, or laid out too oddly, for vectors.
#pragma once

#include "cuda/common/types.cuh"

namespace kronafuse::cuda::bottleneck {

KF_DEVICE float load_element(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::f64:
      return static_cast<float>(static_cast<const double*>(data)[index]);
    case DType::f32:
      return static_cast<const float*>(data)[index];
    case DType::bf16:
      return to_float(static_cast<const bf16*>(data)[index]);
    default:
      return to_float(static_cast<const f16*>(data)[index]);
  }
}

// For sums with a float64, which keep its digits.
KF_DEVICE double load_element_wide(const void* data, int64_t index, DType dtype) {
  return dtype == DType::f64 ? static_cast<const double*>(data)[index] : load_element(data, index, dtype);
}

KF_DEVICE void store_element(void* data, int64_t index, DType dtype, double value) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[index] = value;
      break;
    case DType::f32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case DType::bf16:
      static_cast<bf16*>(data)[index] = from_float<bf16>(static_cast<float>(value));
      break;
    default:
      static_cast<f16*>(data)[index] = from_float<f16>(static_cast<float>(value));
  }
}

// scale · tensor, a 0-d tensor or none.
KF_DEVICE float scale_of(float scale, const void* tensor, DType dtype) {
  return tensor == nullptr ? scale : scale * load_element(tensor, 0, dtype);
}

}  // namespace kronafuse::cuda::bottleneck
