// The state of a running cluster: blocks, warps, threads, what they wait for, and what is on its way.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "cuda/common/tma.cuh"
#include "cuda/emulation/emulation.h"
#include "cuda/emulation/fiber.h"

namespace kronafuse::cuda::emulation {

struct Block;
struct Cluster;
struct Warp;

// A tensor map as the emulation keeps it inside TensorMap's 128 bytes.
struct EmulatedMap {
  uint32_t mark;
  uint8_t element_bytes, dims, swizzle, unused;
  uint64_t data;
  uint64_t stride_bytes[3];  // of dimensions 1, 2, 3
  uint64_t size[4];
  uint16_t box[4];

  static constexpr uint32_t valid_mark = 0x4b46544d;
  int64_t box_bytes() const;
};
static_assert(sizeof(EmulatedMap) <= sizeof(TensorMap));

struct SmallCopy {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
};

struct BoxStore {
  EmulatedMap map;
  int at[4];
  const unsigned char* shared;
};

struct Product {
  float* acc;
  int n;
  DType dtype;
  bool a_in_registers;
  uint32_t a_registers[4];
  uint64_t a, b;
  bool trans_b, accumulate;
};

// Asynchronous operations in the order of their groups: `ends[i]` is where group i ends.
template <class Operation>
struct Groups {
  std::vector<Operation> operations;
  std::vector<size_t> ends;

  void commit() { ends.push_back(operations.size()); }

  // Runs and drops the operations of all groups but the last `pending` ones.
  template <class Run>
  void complete(int pending, Run&& run) {
    if (ends.size() <= static_cast<size_t>(pending)) return;
    const size_t groups = ends.size() - static_cast<size_t>(pending);
    const size_t count = ends[groups - 1];
    for (size_t i = 0; i < count; ++i) run(operations[i]);
    operations.erase(operations.begin(), operations.begin() + static_cast<std::ptrdiff_t>(count));
    ends.erase(ends.begin(), ends.begin() + static_cast<std::ptrdiff_t>(groups));
    for (size_t& end : ends) end -= count;
  }
};

struct Wait {
  const char* what = nullptr;
  const void* object = nullptr;
  int64_t detail = 0;
};

struct Fiber : Thread {
  Block* block;
  Warp* warp;
  int lane;
  bool finished;
  Context context;
  Wait wait;
  Groups<SmallCopy> copies;
  Groups<BoxStore> stores;
  Groups<Product> products;
  bool wgmma_fenced;
};

// All 32 lanes come, each with its argument; the last one does the work for all.
struct Warp {
  Block* block;
  int index;
  std::vector<Fiber*> fibers;
  uint32_t ready = 0, later = 0, arrived = 0;
  bool queued = false;
  const char* collective = nullptr;
  void* arguments[32];
};

struct Barrier {
  int expected = 0;
  int arrived = 0;
  std::vector<Fiber*> waiting;
};

struct Warpgroup {
  int arrived = 0;
  int pending = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  BlockIndices indices;
  Cluster* cluster;
  int rank;
  unsigned char* shared;
  int shared_bytes;
  int alive;
  bool fenced = false;  // by fence_async_shared, once at least
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  Barrier all;
  Barrier named[16];
  std::vector<Warpgroup> warpgroups;

  bool owns(const void* pointer, size_t bytes) const;
};

struct BoxLoad {
  EmulatedMap map;
  int at[4];
  size_t offset;          // in each block's shared memory
  size_t barrier_offset;  // likewise
  uint16_t block_mask;
  int turns_left;
};

struct Cluster {
  std::string kernel;
  Grid grid;
  std::vector<Block> blocks;
  std::deque<Warp*> ready_warps;
  Warp* running = nullptr;
  Barrier all;
  std::vector<Fiber*> mbarrier_waiters;
  std::vector<BoxLoad> loads;
  Context host;
  std::exception_ptr error;
  void (*body)(void*);
  void* parameters;
  uint64_t random_state;

  uint64_t random();
};

inline Fiber& current() { return *static_cast<Fiber*>(current_thread); }

// Stops the current fiber until wake(); `what` and `object` are for the report of a deadlock.
void wait_for(const char* what, const void* object = nullptr, int64_t detail = 0);
void wake(Fiber& fiber);
// Lets all other warps run first.
void yield_turn();

// Lands the load that is due first.
void land(Cluster& cluster, size_t which);
// What a block may not leave behind, in words; empty if all is well.
std::string unfinished_work(const Fiber& fiber);
std::string unfinished_loads(const Cluster& cluster, const Block& block);
// Called when a thread has ended: barriers that count living threads may now be complete.
void recount_barriers(Block& block);
std::string describe(const Fiber& fiber);
// Bytes from the start of the block's shared memory; fails where the range is not inside it.
size_t shared_offset(const void* pointer, size_t bytes, const char* what);
void complete_bytes(Block& block, uint64_t* barrier, int64_t bytes);

// Runs `work(arguments)` once all 32 lanes have come to this collective.
template <class Work>
void warp_collective(const char* name, void* argument, Work&& work) {
  Fiber& fiber = current();
  Warp& warp = *fiber.warp;
  if (warp.arrived == 0) {
    warp.collective = name;
  } else if (warp.collective != name) {
    fail(std::string("a warp's lanes part: this one is at ") + name + ", others are at " + warp.collective);
  }
  warp.arguments[fiber.lane] = argument;
  warp.arrived |= 1u << fiber.lane;
  if (warp.arrived != 0xffffffffu) {
    wait_for(name);
    return;
  }
  work(warp.arguments);
  warp.arrived = 0;
  warp.ready |= 0xffffffffu & ~(1u << fiber.lane);
}

}  // namespace kronafuse::cuda::emulation
