// The rules that a tensor must keep for TMA; the same for the driver and for the emulation.
#pragma once

#include <optional>
#include <string>

#include "cuda/common/tma.cuh"

namespace kronafuse::cuda {

// The rule that is broken, with the numbers; nothing where TMA serves the tensor.
inline std::optional<std::string> tensor_map_problem(const void* data, DType dtype, int dims,
                                                     const TensorExtent* extents, Swizzle swizzle) {
  std::ostringstream text;
  const int64_t element = size_of(dtype);
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (dims < 1 || dims > 4) {
    text << "1 to 4 dimensions; got " << dims;
  } else if (address % 16 != 0) {
    text << "the address must be a multiple of 16; got one that is " << address % 16 << " beyond";
  }
  for (int d = 0; d < dims && text.tellp() == 0; ++d) {
    const TensorExtent& extent = extents[d];
    const int64_t limit = int64_t{1} << 32;
    if (extent.size < 1 || extent.size > limit) {
      text << "size[" << d << "] must be 1 to 2^32; got " << extent.size;
    } else if (extent.box < 1 || extent.box > 256) {
      text << "box[" << d << "] must be 1 to 256; got " << extent.box;
    } else if (d > 0 && (extent.stride_bytes % 16 != 0 || extent.stride_bytes < 0 ||
                         extent.stride_bytes >= (int64_t{1} << 40))) {
      text << "stride[" << d << "] must be a multiple of 16 bytes below 2^40; got " << extent.stride_bytes;
    }
  }
  if (text.tellp() == 0) {
    const int64_t row = extents[0].box * element;
    if (row % 16 != 0) {
      text << "a row of the box must be a multiple of 16 bytes; got " << row;
    } else if (swizzle != Swizzle::none && row != span_of(swizzle)) {
      text << "a row of the box must be the swizzle's " << span_of(swizzle) << " bytes; got " << row;
    }
  }
  if (text.tellp() == 0) return std::nullopt;
  return text.str();
}

}  // namespace kronafuse::cuda
