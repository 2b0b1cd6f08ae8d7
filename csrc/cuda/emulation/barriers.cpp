// Barriers of blocks and clusters, mbarriers, and what a thread that waits says of it.
#include <algorithm>
#include <sstream>

#include "cuda/emulation/machine.h"

namespace kronafuse::cuda::emulation {
namespace {

// The 64 bits of an mbarrier: a mark, the phase's parity, bytes still to come (biased), arrivals missing and expected.
struct MBarrier {
  static constexpr int64_t limit = (1 << 20) - 1;
  uint64_t mark, parity, missing, expected;
  int64_t bytes;

  static MBarrier read(const uint64_t* barrier) {
    uint64_t bits;
    std::memcpy(&bits, barrier, 8);
    return {bits >> 62, bits >> 61 & 1, bits >> 20 & 0xfffff, bits & 0xfffff,
            static_cast<int64_t>(bits >> 40 & 0x1fffff) - limit};
  }

  void write(uint64_t* barrier) const {
    const uint64_t bits =
        mark << 62 | parity << 61 | static_cast<uint64_t>(bytes + limit) << 40 | missing << 20 | expected;
    std::memcpy(barrier, &bits, 8);
  }
};

constexpr uint64_t valid_mark = 2;

MBarrier read_valid(const uint64_t* barrier, const char* what) {
  const MBarrier state = MBarrier::read(barrier);
  if (state.mark != valid_mark) fail(std::string(what) + ": this mbarrier was never initialised");
  return state;
}

void wake_mbarrier_waiters(Cluster& cluster, const uint64_t* barrier) {
  auto& waiters = cluster.mbarrier_waiters;
  const auto end = std::partition(waiters.begin(), waiters.end(), [&](Fiber* f) { return f->wait.object != barrier; });
  for (auto i = end; i != waiters.end(); ++i) wake(**i);
  waiters.erase(end, waiters.end());
}

// Completes the phase when neither arrivals nor bytes are missing.
void settle(Cluster& cluster, uint64_t* barrier, MBarrier state) {
  const bool complete = state.missing == 0 && state.bytes == 0;
  if (complete) {
    state.parity ^= 1;
    state.missing = state.expected;
  }
  state.write(barrier);
  if (complete) wake_mbarrier_waiters(cluster, barrier);
}

void arrive(Block& block, uint64_t* barrier, uint32_t expected_bytes) {
  MBarrier state = read_valid(barrier, "mbarrier_arrive");
  if (state.missing == 0) fail("mbarrier_arrive: all arrivals of this phase have come already");
  state.bytes += expected_bytes;
  if (state.bytes > MBarrier::limit) fail("mbarrier_arrive_expect: more than 2^20 - 1 bytes in one phase");
  state.missing -= 1;
  settle(*block.cluster, barrier, state);
}

void release(Barrier& barrier) {
  for (Fiber* fiber : barrier.waiting) wake(*fiber);
  barrier = Barrier{};
}

// Waits at a barrier of all living threads, of which there are `alive`.
void come(Barrier& barrier, int alive, const char* what) {
  if (++barrier.arrived == alive) {
    release(barrier);
    return;
  }
  barrier.waiting.push_back(&current());
  wait_for(what);
}

int alive_threads(const Cluster& cluster) {
  int alive = 0;
  for (const Block& block : cluster.blocks) alive += block.alive;
  return alive;
}

}  // namespace

void sync_block() {
  Block& block = *current().block;
  come(block.all, block.alive, "__syncthreads");
}

void named_barrier(int id, int threads, bool wait) {
  Block& block = *current().block;
  if (id < 1 || id > 15) fail("named_barrier: id must be 1 to 15; got " + std::to_string(id));
  if (threads <= 0 || threads % 32 != 0 || threads > static_cast<int>(block.fibers.size())) {
    fail("named_barrier: threads must be a multiple of 32 within the block; got " + std::to_string(threads));
  }
  Barrier& barrier = block.named[id];
  if (barrier.arrived != 0 && barrier.expected != threads) {
    fail("named_barrier " + std::to_string(id) + ": one thread names " + std::to_string(threads) +
         " threads, another named " + std::to_string(barrier.expected));
  }
  barrier.expected = threads;
  if (++barrier.arrived == threads) {
    release(barrier);
  } else if (wait) {
    barrier.waiting.push_back(&current());
    wait_for("named_barrier", nullptr, id);
  }
}

uint32_t cluster_rank() { return static_cast<uint32_t>(current().block->rank); }

uint32_t cluster_size() { return static_cast<uint32_t>(current().block->cluster->blocks.size()); }

void cluster_sync() {
  Cluster& cluster = *current().block->cluster;
  come(cluster.all, alive_threads(cluster), "cluster_sync");
}

void fence_async_shared() { current().block->fenced = true; }

void recount_barriers(Block& block) {
  if (block.all.arrived > 0 && block.all.arrived == block.alive) release(block.all);
  Cluster& cluster = *block.cluster;
  if (cluster.all.arrived > 0 && cluster.all.arrived == alive_threads(cluster)) release(cluster.all);
}

void mbarrier_init(uint64_t* barrier, uint32_t count) {
  const size_t offset = shared_offset(barrier, 8, "mbarrier_init");
  if (offset % 8 != 0) fail("mbarrier_init: the address must be a multiple of 8");
  if (count < 1 || count > MBarrier::limit) fail("mbarrier_init: count must be 1 to 2^20 - 1");
  MBarrier{valid_mark, 0, count, count, 0}.write(barrier);
}

void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes) {
  shared_offset(barrier, 8, "mbarrier_arrive");
  arrive(*current().block, barrier, expected_bytes);
}

void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t cta) {
  const size_t offset = shared_offset(barrier, 8, "mbarrier_arrive_cluster");
  Cluster& cluster = *current().block->cluster;
  if (cta >= cluster.blocks.size()) {
    fail("mbarrier_arrive_cluster: no block " + std::to_string(cta) + " in the cluster");
  }
  Block& target = cluster.blocks[cta];
  if (target.alive == 0) fail("mbarrier_arrive_cluster: block " + std::to_string(cta) + " has ended");
  arrive(target, reinterpret_cast<uint64_t*>(target.shared + offset), 0);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  shared_offset(barrier, 8, "mbarrier_wait");
  Cluster& cluster = *current().block->cluster;
  while (read_valid(barrier, "mbarrier_wait").parity == (parity & 1)) {
    cluster.mbarrier_waiters.push_back(&current());
    wait_for("mbarrier_wait", barrier, parity & 1);
  }
}

void complete_bytes(Block& block, uint64_t* barrier, int64_t bytes) {
  MBarrier state = MBarrier::read(barrier);
  KF_CHECK(state.mark == valid_mark, block.cluster->kernel,
           ": a TMA load's mbarrier in block ", block.rank, " of the cluster was never initialised");
  state.bytes -= bytes;
  KF_CHECK(state.bytes >= -MBarrier::limit, block.cluster->kernel, ": more bytes have come than any phase expects");
  settle(*block.cluster, barrier, state);
}

std::string describe(const Fiber& fiber) {
  if (fiber.finished) return "nothing, ended";
  if (fiber.wait.what == nullptr) return "nothing";
  std::ostringstream text;
  text << fiber.wait.what;
  if (std::strcmp(fiber.wait.what, "named_barrier") == 0) {
    const Barrier& barrier = fiber.block->named[fiber.wait.detail];
    text << ' ' << fiber.wait.detail << " (" << barrier.arrived << " of " << barrier.expected << " threads came)";
  } else if (fiber.wait.object != nullptr) {
    const MBarrier state = MBarrier::read(static_cast<const uint64_t*>(fiber.wait.object));
    text << " for parity " << fiber.wait.detail << " at shared byte "
         << static_cast<const unsigned char*>(fiber.wait.object) - fiber.block->shared << " (in parity " << state.parity
         << ", missing " << state.missing << " of " << state.expected << " arrivals and " << state.bytes << " bytes)";
  }
  return text.str();
}

}  // namespace kronafuse::cuda::emulation
