// The Hopper GEMM with tails: a producer thread, two storing warps and two multiplying warpgroups, on tiles that a
// block takes one after the other.
#pragma once

#include "cuda/kron_linear/sm90a/epilogue.cuh"
#include "cuda/kron_linear/sm90a/launch.h"
#include "cuda/kron_linear/sm90a/mainloop.cuh"

namespace kronafuse::cuda {

template <class Traits>
KF_DEVICE void consume(const HopperProblem& problem, const HopperShared<Traits>& shared, int consumer, int first_tile) {
  const TileSchedule& schedule = problem.schedule;
  HopperRing<Traits> ring;
  float acc[Traits::kBlocks][Traits::kTileN / 2];
  int tiles = 0;
  for (int tile = first_tile; tile < schedule.count(); tile += schedule.clusters, ++tiles) {
    if constexpr (Traits::kPingPong) {
      if (tiles % kHopperConsumers != consumer) {
        ring.advance(problem.k_blocks);
        continue;
      }
      // A wait for a stage knows its round by parity alone: it may begin only when the tile before has seen all of
      // its own.
      mbarrier_wait(&shared.extra().turn[consumer], static_cast<uint32_t>(tiles / 2 + (consumer == 0)) & 1u);
    }
    multiply(acc, shared, ring, Traits::kPingPong ? 0 : consumer * Traits::kConsumerM, problem.k_blocks,
             schedule.cluster);
    if constexpr (Traits::kPingPong) {
      if (threadIdx.x % 128 == 0) mbarrier_arrive(&shared.extra().turn[1 - consumer]);
    }
    finish_products(acc, shared, ring, schedule.cluster);
    const int own_tiles = Traits::kPingPong ? tiles / kHopperConsumers : tiles;
    write_chunks<Traits>(acc, shared, consumer, own_tiles * (Traits::kChunks / Traits::kSlots), problem.has_base);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kHopperThreads, 1)
    linear_sm90a_kernel(const __grid_constant__ HopperProblem problem) {
  const HopperShared<Traits> shared{dynamic_shared()};
  const int cluster = problem.schedule.cluster;
  if (threadIdx.x == 0) {
    shared.initialise(cluster);
    fence_mbarrier_init();
  }
  cluster_sync();

  const int rank = static_cast<int>(cluster_rank());
  const int first_tile = static_cast<int>(blockIdx.x) / cluster;
  const int role = shfl(warp_index(), 0);
  // 40 · 128 + 232 · 256 registers are what a multiprocessor has.
  if (role < 4) {
    registers_decrease<40>();
    if (role == 0) {
      if (elect_one()) fetch(problem, shared, first_tile, rank);
    } else if (role <= kHopperConsumers) {
      store_results(problem, shared, role - 1, first_tile, rank);
    }
  } else {
    registers_increase<232>();
    consume(problem, shared, role / 4 - 1, first_tile);
  }
  // A block's shared memory outlives every copy and arrival that its neighbour sends there.
  sync_warp();
  cluster_sync();
}

template <class T, int Form, bool Transposed>
void launch_linear_sm90a(const HopperProblem& problem, Stream stream) {
  using Traits = HopperTraits<T, Form, Transposed>;
  const TileSchedule& schedule = problem.schedule;
  Launch settings;
  settings.grid.x = static_cast<unsigned>(schedule.clusters * schedule.cluster);
  settings.threads = kHopperThreads;
  settings.shared_bytes = hopper_shared_bytes(Traits::kForm);
  settings.stream = stream;
  settings.cluster = schedule.cluster;
  launch<linear_sm90a_kernel<Traits>>(settings, problem);
}

}  // namespace kronafuse::cuda

// The instances of one form; each form is compiled in a file of its own.
#ifdef KRONAFUSE_ONE_INSTANCE
#define KF_HOPPER_INSTANCES(FORM) \
  template void ::kronafuse::cuda::launch_linear_sm90a<::kronafuse::cuda::bf16, FORM, false>( \
      const ::kronafuse::cuda::HopperProblem&, ::kronafuse::cuda::Stream);
#else
#define KF_HOPPER_INSTANCE(T, FORM, TRANSPOSED)                                                  \
  template void ::kronafuse::cuda::launch_linear_sm90a<::kronafuse::cuda::T, FORM, TRANSPOSED>( \
      const ::kronafuse::cuda::HopperProblem&, ::kronafuse::cuda::Stream);
#define KF_HOPPER_INSTANCES(FORM)       \
  KF_HOPPER_INSTANCE(bf16, FORM, false) \
  KF_HOPPER_INSTANCE(bf16, FORM, true)  \
  KF_HOPPER_INSTANCE(f16, FORM, false)  \
  KF_HOPPER_INSTANCE(f16, FORM, true)
#endif
