// Barriers: mbarriers in shared memory (phases, expected bytes), named barriers, clusters; and the split of registers
// between warpgroups.
#pragma once

#include "cuda/common/platform.cuh"

namespace kronafuse::cuda {

#ifdef KRONAFUSE_EMULATED

inline void mbarrier_init(uint64_t* barrier, uint32_t count) { emulation::mbarrier_init(barrier, count); }
inline void mbarrier_arrive(uint64_t* barrier) { emulation::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emulation::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulation::mbarrier_wait(barrier, parity); }
inline void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t cta) {
  emulation::mbarrier_arrive_cluster(barrier, cta);
}
inline void fence_mbarrier_init() {}
inline void fence_async_shared() { emulation::fence_async_shared(); }
inline void named_barrier(int id, int threads) { emulation::named_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emulation::named_barrier(id, threads, false); }
inline uint32_t cluster_rank() { return emulation::cluster_rank(); }
inline uint32_t cluster_size() { return emulation::cluster_size(); }
inline void cluster_sync() { emulation::cluster_sync(); }
template <int N>
inline void registers_increase() {}
template <int N>
inline void registers_decrease() {}

#else

// One thread initialises; then fence_mbarrier_init() and a barrier of all that use it.
KF_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

KF_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and lets the phase wait for `bytes` more from asynchronous copies.
KF_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}\n" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Until the phase of this parity is complete. A fresh barrier is in phase 0: waiting for parity 1 returns at once.
KF_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

// Arrives at the barrier that lies at the same place of shared memory in block `cta` of the cluster. It orders the
// block's own memory, enough for handing back what asynchronous copies write; a wider scope would fence the whole
// GPU's.
KF_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t cta) {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(barrier)),
      "r"(cta)
      : "memory");
#else
  __trap();
#endif
}

// Makes initialised mbarriers visible to the cluster and to asynchronous copies.
KF_DEVICE void fence_mbarrier_init() {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Orders this thread's ordinary writes of shared memory before later asynchronous reads of it (wgmma, TMA stores).
KF_DEVICE void fence_async_shared() {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Of `threads` threads (a multiple of 32) that name barrier `id`, 1 to 15; __syncthreads() is barrier 0.
KF_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as having come, and goes on.
KF_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

KF_DEVICE uint32_t cluster_rank() {
#ifdef KRONAFUSE_HAS_SM90
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

KF_DEVICE uint32_t cluster_size() {
#ifdef KRONAFUSE_HAS_SM90
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// Of all threads of the cluster's blocks.
KF_DEVICE void cluster_sync() {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

template <int N>
KF_DEVICE void registers_increase() {
#ifdef KRONAFUSE_HAS_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N>
KF_DEVICE void registers_decrease() {
#ifdef KRONAFUSE_HAS_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

#endif

}  // namespace kronafuse::cuda
