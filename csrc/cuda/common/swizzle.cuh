// The patterns in which TMA lays a tile into shared memory and wgmma reads it, so that rows fall into different banks.
#pragma once

#include "cuda/common/platform.cuh"

namespace kronafuse::cuda {

// The span in bytes that is permuted; a tile must begin at a multiple of 8 spans (none: of 16 bytes).
enum class Swizzle : int { none = 0, b32 = 1, b64 = 2, b128 = 3 };

constexpr int span_of(Swizzle swizzle) { return swizzle == Swizzle::none ? 16 : 16 << static_cast<int>(swizzle); }

// Where the byte at this offset of the plain tile lies: bits 4.. are XORed with as many bits from 7 on.
KF_HOST_DEVICE constexpr uint32_t swizzled(uint32_t offset, Swizzle swizzle) {
  const uint32_t mask = (1u << static_cast<int>(swizzle)) - 1u;
  return offset ^ (((offset >> 7) & mask) << 4);
}

}  // namespace kronafuse::cuda
