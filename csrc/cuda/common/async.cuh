// cp.async: copies of 16, 8 or 4 bytes from global to shared memory that land while the thread goes on.
#pragma once

#include "cuda/common/platform.cuh"

namespace kronafuse::cuda {

#ifdef KRONAFUSE_EMULATED

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::cp_async(shared, global, 16, valid);
}
inline void cp_async_8(void* shared, const void* global, bool valid) {
  emulation::cp_async(shared, global, 8, valid);
}
inline void cp_async_4(void* shared, const void* global, bool valid) {
  emulation::cp_async(shared, global, 4, valid);
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int N>
inline void cp_async_wait() {
  emulation::cp_async_wait(N);
}

#else

// Writes zeros where not valid; the global address is not touched then.
KF_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// Smaller ones pass through L1, which joins what neighbouring lanes ask for.
KF_DEVICE void cp_async_8(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

KF_DEVICE void cp_async_4(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

KF_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of this thread's committed groups are on their way. Other threads' copies need a barrier after it.
template <int N>
KF_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

}  // namespace kronafuse::cuda
