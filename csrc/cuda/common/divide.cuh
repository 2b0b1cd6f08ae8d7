// Division by a number that is known when the kernel starts, as a multiplication: a GPU has no instruction for it.
#pragma once

#include <cstdint>

#include "cuda/common/platform.cuh"

namespace kronafuse::cuda {

// Quotients of numbers below 2^31 by 1 .. 2^31 - 1.
struct Divider {
  uint32_t divisor = 1;
  uint32_t multiplier = 0;  // 2^32 too small: the number itself is added after the multiplication
  uint32_t shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }

  KF_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> 32);
    return (high + n) >> shift;
  }
};

}  // namespace kronafuse::cuda
