// What CUDA C++ adds to C++, for g++: qualifiers, the built-in indices, and the few intrinsics that kernels use.
// Static __shared__ variables are left out on purpose: one copy per block cannot be had from a plain variable.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda/emulation/emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::kronafuse::cuda::emulation::current_thread->index)
#define blockIdx (::kronafuse::cuda::emulation::current_thread->where->index)
#define blockDim (::kronafuse::cuda::emulation::current_thread->where->dim)
#define gridDim (::kronafuse::cuda::emulation::current_thread->where->grid)

inline void __syncthreads() { ::kronafuse::cuda::emulation::sync_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { ::kronafuse::cuda::emulation::sync_warp(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { ::kronafuse::cuda::emulation::fail("__trap() was reached"); }

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
