// A warp's own exchange: shuffles, sums, the choice of one lane. All 32 lanes must call.
#pragma once

#include "cuda/common/platform.cuh"

namespace kronafuse::cuda {

KF_DEVICE int lane() { return static_cast<int>(threadIdx.x) % 32; }

KF_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

#ifdef KRONAFUSE_EMULATED

template <class T>
inline T shfl(T value, int source) {
  return emulation::shuffle(value, source);
}
template <class T>
inline T shfl_xor(T value, int mask) {
  return emulation::shuffle(value, lane() ^ mask);
}
inline bool elect_one() { return emulation::elect_one(); }
inline void sync_warp() { emulation::sync_warp(); }

#else

template <class T>
KF_DEVICE T shfl(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

template <class T>
KF_DEVICE T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// True in one lane of the warp, the same one each time.
KF_DEVICE bool elect_one() {
#ifdef KRONAFUSE_HAS_SM90
  uint32_t chosen;
  asm volatile(
      "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(chosen));
  return chosen != 0;
#else
  return lane() == 0;
#endif
}

KF_DEVICE void sync_warp() { __syncwarp(); }

#endif

// The sum over the warp, in every lane, in a fixed order.
KF_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

}  // namespace kronafuse::cuda
