// The part of a launch that is the same for every kernel.
#ifndef KRONAFUSE_EMULATED

#include <mutex>

#include "cuda/common/kernel_name.h"
#include "cuda/common/launch.cuh"

namespace kronafuse::cuda {
namespace {

int current_device() {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  KF_CHECK(status == cudaSuccess, "cudaGetDevice: ", cudaGetErrorString(status));
  KF_CHECK(device < detail::max_devices, "kronafuse serves ", detail::max_devices, " CUDA devices; got device ",
           device);
  return device;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, which, device);
  KF_CHECK(status == cudaSuccess, "cudaDeviceGetAttribute ", static_cast<int>(which), ": ", cudaGetErrorString(status));
  return value;
}

// Raises what a kernel may ask for. Two threads take turns, else the smaller request could be the last to be set.
void grant(const void* kernel, const char* name, int shared_bytes, std::atomic<int>& granted) {
  static std::mutex turn;
  const std::lock_guard<std::mutex> lock(turn);
  if (granted.load(std::memory_order_relaxed) >= shared_bytes) return;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) cudaGetLastError();
  KF_CHECK(status == cudaSuccess, kernel_name(name), ": ", shared_bytes,
           " bytes of shared memory refused; the device has ", device_info().shared_per_block, ": ",
           cudaGetErrorString(status));
  granted.store(shared_bytes, std::memory_order_release);
}

}  // namespace

DeviceInfo device_info() {
  static std::atomic<bool> known[detail::max_devices];
  static DeviceInfo infos[detail::max_devices];
  const int device = current_device();
  if (!known[device].load(std::memory_order_acquire)) {
    DeviceInfo info;
    info.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    info.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    info.major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    info.minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    infos[device] = info;
    known[device].store(true, std::memory_order_release);
  }
  return infos[device];
}

namespace detail {

void launch_kernel(const void* kernel, const char* name, const Launch& launch, void** parameters, Granted& granted) {
  constexpr int always_granted = 48 * 1024;
  if (launch.shared_bytes > always_granted) {
    std::atomic<int>& bytes = granted.bytes[current_device()];
    if (bytes.load(std::memory_order_acquire) < launch.shared_bytes) grant(kernel, name, launch.shared_bytes, bytes);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.grid.x, launch.grid.y, launch.grid.z);
  config.blockDim = dim3(static_cast<unsigned>(launch.threads), 1, 1);
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  cudaLaunchAttribute cluster = {};
  if (launch.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  const cudaError_t status = cudaLaunchKernelExC(&config, kernel, parameters);
  if (status != cudaSuccess) cudaGetLastError();
  KF_CHECK(status == cudaSuccess, kernel_name(name), ": launch of grid (", launch.grid.x, ", ", launch.grid.y, ", ",
           launch.grid.z, "), ", launch.threads, " threads, ", launch.shared_bytes,
           " bytes of shared memory, clusters of ", launch.cluster, " refused: ", cudaGetErrorString(status));
}

}  // namespace detail
}  // namespace kronafuse::cuda

#endif
