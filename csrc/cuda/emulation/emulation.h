// A GPU on the host: every thread of a block, or of a cluster's blocks, is a fiber of one OS thread, and runs until it
// waits for others. Asynchronous copies and products happen as late as their waits allow, the copies' targets being NaN
// meanwhile, so that a missing wait or barrier gives a wrong result here too. A deadlock is an Error that says where
// each thread waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "common/view.h"

namespace kronafuse::cuda::emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// What a kernel sees of its block and of itself.
struct BlockIndices {
  Index index, dim, grid;
};
struct Thread {
  Index index;
  const BlockIndices* where;
};

extern Thread* current_thread;

struct Grid {
  unsigned x, y, z;
  int threads;
  int shared_bytes;
  int cluster;
};

// Runs `body(parameters)` as every thread of the grid. Throws what a thread throws, and on a deadlock.
void run(const char* pretty_name, const Grid& grid, void (*body)(void*), void* parameters);

// The device that device_info() tells of, and the order in which warps run: 0 takes turns, other seeds draw it.
struct Settings {
  int multiprocessors = 4;
  int shared_per_block = 227 * 1024;
  int major = 9;
  int minor = 0;
  uint64_t seed = 0;
};
Settings& settings();

// An Error with the kernel, block and thread in which it was found.
[[noreturn]] void fail(const std::string& what);

// Memory
unsigned char* dynamic_shared();
uint32_t shared_address(const void* pointer);
void check_vector_address(const void* pointer);

// Warp
void sync_warp();
bool elect_one();
uint64_t shuffle_bits(uint64_t value, int source);

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle_bits(bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

void ldmatrix(uint32_t* fragment, int count, const void* row, bool transposed);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, DType dtype);

// Barriers
void sync_block();
void named_barrier(int id, int threads, bool wait);
void mbarrier_init(uint64_t* barrier, uint32_t count);
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t cta);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_sync();
void fence_async_shared();

// Copies
void cp_async(void* shared, const void* global, int bytes, bool valid);  // 16, 8 or 4
void cp_async_commit();
void cp_async_wait(int pending);
uint16_t own_block_mask();
void tma_prefetch(const void* map);
void tma_load(void* shared, const void* map, int dims, const int* at, uint64_t* barrier, uint16_t block_mask);
void tma_store(const void* map, const void* shared, int dims, const int* at);
void tma_store_commit();
void tma_store_wait(int pending);

// Products of a warpgroup
void wgmma_fence();
void wgmma(float* acc, int n, DType dtype, const uint32_t* a_registers, uint64_t a, uint64_t b, bool trans_b,
           bool accumulate);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace kronafuse::cuda::emulation
