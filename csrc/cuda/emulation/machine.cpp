// Blocks one after another (a cluster's together), warps in turn, threads of a warp until each waits.
#include "cuda/emulation/machine.h"
#include "cuda/emulation/memory.h"

#include <algorithm>
#include <mutex>
#include <sstream>

#include "cuda/common/kernel_name.h"
#include "cuda/common/stream.h"

namespace kronafuse::cuda {

DeviceInfo device_info() {
  const emulation::Settings& settings = emulation::settings();
  return {settings.multiprocessors, settings.shared_per_block, settings.major, settings.minor};
}

namespace emulation {

Thread* current_thread = nullptr;

Settings& settings() {
  static Settings instance;
  return instance;
}

namespace {

void check_grid(const std::string& kernel, const Grid& grid) {
  KF_CHECK(grid.threads > 0 && grid.threads <= 1024 && grid.threads % 32 == 0, kernel,
           ": threads must be a multiple of 32 up to 1024; got ", grid.threads);
  KF_CHECK(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535u && grid.z <= 65535u,
           kernel, ": grid must be within (2^31 - 1, 65535, 65535) and not empty; got (", grid.x, ", ", grid.y, ", ",
           grid.z, ")");
  KF_CHECK(grid.shared_bytes >= 0 && grid.shared_bytes <= settings().shared_per_block, kernel,
           ": shared memory must be at most ", settings().shared_per_block, " bytes; got ", grid.shared_bytes);
  KF_CHECK(grid.cluster >= 1 && grid.cluster <= 8 && grid.x % static_cast<unsigned>(grid.cluster) == 0, kernel,
           ": grid x must be a multiple of the cluster, at most 8; got ", grid.x, " and ", grid.cluster);
}

void finish(Fiber& fiber) {
  const std::string left = unfinished_work(fiber);
  if (!left.empty()) fail(left);
  fiber.finished = true;
  Block& block = *fiber.block;
  if (--block.alive == 0) {
    const std::string loads = unfinished_loads(*block.cluster, block);
    if (!loads.empty()) fail(loads);
  }
  recount_barriers(block);
}

void fiber_entry() {
  Cluster& cluster = *current().block->cluster;
  try {
    cluster.body(cluster.parameters);
    finish(current());
  } catch (...) {
    cluster.error = std::current_exception();
  }
  Fiber& self = current();
  switch_context(self.context, cluster.host);
}

void set_up(Cluster& cluster, Stacks& stacks, SharedMemory& memory, unsigned first_x, unsigned y, unsigned z) {
  const Grid& grid = cluster.grid;
  size_t stack = 0;
  for (size_t b = 0; b < cluster.blocks.size(); ++b) {
    Block& block = cluster.blocks[b];
    block = Block{};
    block.indices = {{first_x + static_cast<unsigned>(b), y, z},
                     {static_cast<unsigned>(grid.threads), 1, 1},
                     {grid.x, grid.y, grid.z}};
    block.cluster = &cluster;
    block.rank = static_cast<int>(b);
    block.shared_bytes = grid.shared_bytes;
    block.shared = memory.at(b, static_cast<size_t>(grid.shared_bytes));
    block.alive = grid.threads;
    block.fibers.resize(static_cast<size_t>(grid.threads));
    block.warps.resize(static_cast<size_t>(grid.threads / 32));
    block.warpgroups.resize(static_cast<size_t>((grid.threads + 127) / 128));
    for (int t = 0; t < grid.threads; ++t, ++stack) {
      Fiber& fiber = block.fibers[static_cast<size_t>(t)];
      Warp& warp = block.warps[static_cast<size_t>(t / 32)];
      fiber.index = {static_cast<unsigned>(t), 0, 0};
      fiber.where = &block.indices;
      fiber.block = &block;
      fiber.warp = &warp;
      fiber.lane = t % 32;
      fiber.finished = false;
      fiber.wgmma_fenced = false;
      warp.fibers.push_back(&fiber);
      // Stacks that began at the same place of their pages would share a few cache sets.
      const size_t stagger = (stack % 64) * 576;
      begin_context(fiber.context, stacks.at(stack), Stacks::bytes - stagger, fiber_entry);
    }
    for (size_t w = 0; w < block.warps.size(); ++w) {
      Warp& warp = block.warps[w];
      warp.block = &block;
      warp.index = static_cast<int>(w);
      warp.ready = 0xffffffffu;
      warp.queued = true;
      cluster.ready_warps.push_back(&warp);
    }
  }
}

[[noreturn]] void report_deadlock(const Cluster& cluster) {
  std::ostringstream text;
  text << cluster.kernel << ": deadlock; the threads wait";
  for (const Block& block : cluster.blocks) {
    std::string last;
    size_t first_thread = 0;
    const auto flush = [&](size_t end) {
      if (last.empty()) return;
      text << "\n  block (" << block.indices.index.x << ", " << block.indices.index.y << ", " << block.indices.index.z
           << ") threads " << first_thread << " to " << end - 1 << ": " << last;
    };
    for (size_t t = 0; t < block.fibers.size(); ++t) {
      const std::string now = describe(block.fibers[t]);
      if (now == last) continue;
      flush(t);
      last = now;
      first_thread = t;
    }
    flush(block.fibers.size());
  }
  throw Error(text.str());
}

Warp* next_warp(Cluster& cluster) {
  if (cluster.ready_warps.empty()) return nullptr;
  const size_t which = settings().seed == 0 ? 0 : cluster.random() % cluster.ready_warps.size();
  Warp* warp = cluster.ready_warps[which];
  cluster.ready_warps.erase(cluster.ready_warps.begin() + static_cast<std::ptrdiff_t>(which));
  warp->queued = false;
  return warp;
}

void run_warp(Cluster& cluster, Warp& warp) {
  cluster.running = &warp;
  while (warp.ready != 0) {
    const int lane = __builtin_ctz(warp.ready);
    warp.ready &= warp.ready - 1;
    Fiber& fiber = *warp.fibers[static_cast<size_t>(lane)];
    current_thread = &fiber;
    switch_context(cluster.host, fiber.context);
    if (cluster.error) std::rethrow_exception(cluster.error);
  }
  cluster.running = nullptr;
  if (warp.later != 0) {
    warp.ready = warp.later;
    warp.later = 0;
    warp.queued = true;
    cluster.ready_warps.push_back(&warp);
  }
}

void run_cluster(Cluster& cluster) {
  const auto first_due = [&] {
    const auto due = [](const BoxLoad& a, const BoxLoad& b) { return a.turns_left < b.turns_left; };
    return static_cast<size_t>(std::min_element(cluster.loads.begin(), cluster.loads.end(), due) -
                               cluster.loads.begin());
  };
  while (true) {
    if (Warp* warp = next_warp(cluster)) {
      run_warp(cluster, *warp);
      for (size_t i = 0; i < cluster.loads.size();) {
        if (--cluster.loads[i].turns_left > 0) {
          ++i;
        } else {
          land(cluster, i);
        }
      }
    } else if (!cluster.loads.empty()) {
      land(cluster, first_due());
    } else {
      break;
    }
  }
  for (const Block& block : cluster.blocks) {
    if (block.alive > 0) report_deadlock(cluster);
  }
  for (const Block& block : cluster.blocks) check_guards(block);
}

}  // namespace

bool Block::owns(const void* pointer, size_t bytes) const {
  const auto* address = static_cast<const unsigned char*>(pointer);
  return address >= shared && address + bytes <= shared + shared_bytes;
}

uint64_t Cluster::random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void run(const char* pretty_name, const Grid& grid, void (*body)(void*), void* parameters) {
  static std::mutex one_launch_at_a_time;
  static Stacks stacks;
  static SharedMemory memory;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Cluster cluster;
  cluster.kernel = kernel_name(pretty_name);
  check_grid(cluster.kernel, grid);
  cluster.grid = grid;
  cluster.body = body;
  cluster.parameters = parameters;
  cluster.random_state = settings().seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
  cluster.blocks.resize(static_cast<size_t>(grid.cluster));
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += static_cast<unsigned>(grid.cluster)) {
        set_up(cluster, stacks, memory, x, y, z);
        run_cluster(cluster);
      }
    }
  }
}

void fail(const std::string& what) {
  const Fiber& fiber = current();
  const Index& block = fiber.where->index;
  std::ostringstream text;
  text << fiber.block->cluster->kernel << ": " << what << " (block (" << block.x << ", " << block.y << ", " << block.z
       << "), thread " << fiber.index.x << ")";
  throw Error(text.str());
}

void wait_for(const char* what, const void* object, int64_t detail) {
  Fiber& fiber = current();
  fiber.wait = {what, object, detail};
  switch_context(fiber.context, fiber.block->cluster->host);
  fiber.wait = {};
}

void wake(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  Cluster& cluster = *fiber.block->cluster;
  warp.ready |= 1u << fiber.lane;
  if (&warp == cluster.running || warp.queued) return;
  warp.queued = true;
  cluster.ready_warps.push_back(&warp);
}

void yield_turn() {
  Fiber& fiber = current();
  fiber.warp->later |= 1u << fiber.lane;
  wait_for("its turn");
}

}  // namespace emulation
}  // namespace kronafuse::cuda
