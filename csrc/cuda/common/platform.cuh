// Where the code is compiled: by nvcc for a GPU, or by g++ for the emulation on the host (KRONAFUSE_EMULATED).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef KRONAFUSE_EMULATED
#include "cuda/emulation/language.h"
#define KF_DEVICE inline
#define KF_HOST_DEVICE inline
#elif defined(__CUDACC__)
#define KF_DEVICE __device__ __forceinline__
#define KF_HOST_DEVICE __host__ __device__ __forceinline__
#else  // a .cpp file of the CUDA library: what runs on both sides, for the host
#define KF_HOST_DEVICE inline
#endif

// Instructions that an architecture lacks: the code compiles for it, and traps if it is ever reached.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KRONAFUSE_HAS_SM90 1
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KRONAFUSE_HAS_SM90A 1
#endif

namespace kronafuse::cuda {

#ifdef __CUDACC__
// The 32-bit address of a pointer into shared memory, as the PTX instructions take it.
KF_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

}  // namespace kronafuse::cuda
