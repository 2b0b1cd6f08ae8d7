// Tensor maps by the CUDA driver's encoder, found through the runtime: the library does not link libcuda.
#ifndef KRONAFUSE_EMULATED

#include <cuda.h>

#include "cuda/common/tensor_map.h"

namespace kronafuse::cuda {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    KF_CHECK(status == cudaSuccess && result == cudaDriverEntryPointSuccess && entry != nullptr,
             "the CUDA driver has no cuTensorMapEncodeTiled (12.0 and later do): ", cudaGetErrorString(status));
    return reinterpret_cast<Encode>(entry);
  }();
  return found;
}

// A thread that has launched nothing yet, as autograd's may be, has no context, and the driver makes none by itself as
// the runtime does.
void make_context_current() {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  KF_CHECK(status == cudaSuccess, "no CUDA context for a tensor map: ", cudaGetErrorString(status));
}

CUtensorMapDataType data_type(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
    case DType::f32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case DType::bf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  }
}

CUtensorMapSwizzle swizzle_of(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::b32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::b64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::b128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

}  // namespace

bool tensor_map_serves(const void* data, DType dtype, int dims, const TensorExtent* extents, Swizzle swizzle) {
  return !tensor_map_problem(data, dtype, dims, extents, swizzle);
}

TensorMap make_tensor_map(const void* data, DType dtype, int dims, const TensorExtent* extents, Swizzle swizzle) {
  const std::optional<std::string> problem = tensor_map_problem(data, dtype, dims, extents, swizzle);
  KF_CHECK(!problem, "tensor map: ", *problem);
  cuuint64_t sizes[4], strides[4];
  cuuint32_t box[4], steps[4];
  for (int d = 0; d < dims; ++d) {
    sizes[d] = static_cast<cuuint64_t>(extents[d].size);
    box[d] = static_cast<cuuint32_t>(extents[d].box);
    steps[d] = 1;
    if (d > 0) strides[d - 1] = static_cast<cuuint64_t>(extents[d].stride_bytes);
  }
  TensorMap map;
  const auto encode = [&] {
    return encoder()(reinterpret_cast<CUtensorMap*>(&map), data_type(dtype), static_cast<cuuint32_t>(dims),
                     const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     swizzle_of(swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode();
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    make_context_current();
    status = encode();
  }
  KF_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: CUresult ", static_cast<int>(status), " for ", dims,
           " dimensions, innermost ", extents[0].size, ", box ", extents[0].box);
  return map;
}

}  // namespace kronafuse::cuda

#endif
