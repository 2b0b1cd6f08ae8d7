// What every host interface needs to know of the device: the stream to launch on, and the device's size.
#pragma once

namespace kronafuse::cuda {

using Stream = void*;  // a cudaStream_t

struct DeviceInfo {
  int multiprocessors = 0;
  int shared_per_block = 0;  // bytes of dynamic shared memory that one block may ask for
  int major = 0;
  int minor = 0;
};

// Of the current device.
DeviceInfo device_info();

}  // namespace kronafuse::cuda
