// What a kernel's configuration is, for tables that the host can read without CUDA.
#pragma once

namespace kronafuse {

// One configuration of a kernel template: the work of a block and what it takes of the multiprocessor.
// What a kernel has no use for is 0, as stages where nothing is pipelined.
struct Configuration {
  const char* name;  // unique within the kernel
  int tile_m;
  int tile_n;
  int tile_k;
  int stages;
  int threads;
  int shared_bytes;  // dynamic
};

// The configurations of one kernel, as csrc/python/module.cpp shows them.
struct ConfigurationTable {
  const char* kernel;
  const Configuration* first;
  int count;
};

template <int Count>
constexpr ConfigurationTable configuration_table(const char* kernel, const Configuration (&rows)[Count]) {
  return {kernel, rows, Count};
}

}  // namespace kronafuse
