// Launching a kernel, what the host asks the device, and the dynamic shared memory of a block.
#pragma once

#include <tuple>
#include <utility>

#ifndef KRONAFUSE_EMULATED
#include <atomic>
#endif

#include "common/check.h"
#include "cuda/common/platform.cuh"
#include "cuda/common/stream.h"

namespace kronafuse::cuda {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  Dim3 grid;
  int threads = 0;
  int shared_bytes = 0;
  Stream stream = nullptr;
  int cluster = 1;  // blocks along x that share a cluster
};

#ifdef KRONAFUSE_EMULATED

namespace detail {

template <auto Kernel, class... Parameters, class... Arguments>
void launch_as(void (*)(Parameters...), const char* name, const Launch& launch, Arguments&&... arguments) {
  std::tuple<Parameters...> parameters(static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  const emulation::Grid grid{launch.grid.x, launch.grid.y,       launch.grid.z, launch.threads,
                             launch.shared_bytes, launch.cluster};
  emulation::run(
      name, grid, [](void* packed) { std::apply(Kernel, *static_cast<std::tuple<Parameters...>*>(packed)); },
      &parameters);
}

}  // namespace detail

// 1024-byte aligned.
inline unsigned char* dynamic_shared() { return emulation::dynamic_shared(); }

#else

namespace detail {

constexpr int max_devices = 64;

// The most dynamic shared memory that one kernel has been granted so far, on each device.
struct Granted {
  std::atomic<int> bytes[max_devices];
};

void launch_kernel(const void* kernel, const char* name, const Launch& launch, void** parameters, Granted& granted);

template <auto Kernel, class... Parameters, class... Arguments>
void launch_as(void (*kernel)(Parameters...), const char* name, const Launch& launch, Arguments&&... arguments) {
  static Granted granted{};
  std::tuple<Parameters...> values(static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  std::apply(
      [&](auto&... value) {
        void* pointers[sizeof...(Parameters) + 1] = {const_cast<void*>(static_cast<const void*>(&value))...};
        launch_kernel(reinterpret_cast<const void*>(kernel), name, launch, pointers, granted);
      },
      values);
}

}  // namespace detail

// 1024-byte aligned.
KF_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char kronafuse_dynamic_shared[];
  return kronafuse_dynamic_shared;
}

#endif

// launch<my_kernel<bf16, 128>>(Launch{...}, arguments...): arguments are converted to the kernel's parameter types.
// Throws Error with the kernel, grid and shared memory where the launch is refused.
template <auto Kernel, class... Arguments>
void launch(const Launch& launch, Arguments&&... arguments) {
  detail::launch_as<Kernel>(Kernel, __PRETTY_FUNCTION__, launch, std::forward<Arguments>(arguments)...);
}

}  // namespace kronafuse::cuda
