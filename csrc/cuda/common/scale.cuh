// Numbers whose dtype is known at run time only: scales, and factors in whatever dtype they are trained in.
#pragma once

#include "common/view.h"
#include "cuda/common/types.cuh"

namespace kronafuse::cuda {

// An element of any dtype as Wide (float or double), not rounded to a narrower one on the way.
template <class Wide = float>
KF_HOST_DEVICE Wide load_number(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::f64:
      return static_cast<Wide>(static_cast<const double*>(data)[index]);
    case DType::f32:
      return static_cast<Wide>(static_cast<const float*>(data)[index]);
    case DType::bf16:
      return static_cast<Wide>(to_float(static_cast<const bf16*>(data)[index]));
    default:
      return static_cast<Wide>(to_float(static_cast<const f16*>(data)[index]));
  }
}

// s times a 0-d tensor that only the device reads; s alone where there is none.
template <class Wide = float>
KF_HOST_DEVICE Wide scale_value(Wide scale, const void* tensor, DType dtype) {
  return tensor == nullptr ? scale : scale * load_number<Wide>(tensor, 0, dtype);
}

}  // namespace kronafuse::cuda
