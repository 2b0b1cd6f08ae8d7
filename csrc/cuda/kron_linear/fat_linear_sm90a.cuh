// The Hopper form of fat_linear: one thread fetches tiles of x and W by TMA, three warps round tiles of B, two
// warpgroups multiply and mix. As in the plain form the K loop runs over blocks of i2 and, inside, over i1.
//
// A warpgroup takes x from shared memory into registers once: as wgmma's left operand for x Wᵀ, and, while that product
// runs, times A[o1, i1] into the sum A X. That sum is laid out as the left operand of the product with B.
#pragma once

#include "cuda/kron_linear/fat/hopper_consumer.cuh"
#include "cuda/kron_linear/fat/hopper_producer.cuh"

namespace kronafuse::cuda {

template <class Traits>
__global__ void __launch_bounds__(kFatHopperThreads, 1)
    fat_hopper_kernel(const __grid_constant__ FatHopperProblem problem) {
  const FatHopperShared<Traits> shared{dynamic_shared()};
  if (threadIdx.x == 0) {
    shared.initialise();
    fence_mbarrier_init();
  }
  __syncthreads();
  const int role = shfl(warp_index(), 0);
  if (role < 4) {
    registers_decrease<kFatHopperProducerRegisters>();
    if (role == 0) {
      if (lane() == 0) fat_hopper_fetch(problem, shared);
    } else {
      fat_hopper_load_rights(problem.p, shared, static_cast<int>(threadIdx.x) - 32);
    }
  } else {
    registers_increase<kFatHopperConsumerRegisters>();
    fat_hopper_consume(problem.p, shared, role / 4 - 1);
  }
}

template <class T, int TILE_N, bool TRANSPOSED>
void launch_fat_linear_sm90a(const FatHopperProblem& problem, int multiprocessors, Stream stream) {
  const int64_t tiles = problem.p.m_blocks * problem.p.n_blocks;
  Launch settings;
  settings.grid.x = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
  settings.threads = kFatHopperThreads;
  settings.shared_bytes = fat_hopper_shared_bytes(TILE_N);
  settings.stream = stream;
  launch<fat_hopper_kernel<FatHopperTraits<T, TILE_N, TRANSPOSED>>>(settings, problem);
}

}  // namespace kronafuse::cuda

// The instances of one tile; each tile is compiled in a file of its own.
#define KF_FAT_HOPPER_INSTANCE(T, TILE_N, TRANSPOSED)                                                   \
  template void ::kronafuse::cuda::launch_fat_linear_sm90a<::kronafuse::cuda::T, TILE_N, TRANSPOSED>( \
      const ::kronafuse::cuda::FatHopperProblem&, int, ::kronafuse::cuda::Stream);
#ifdef KRONAFUSE_ONE_INSTANCE
#define KF_FAT_HOPPER_INSTANCES(TILE_N) KF_FAT_HOPPER_INSTANCE(bf16, TILE_N, false)
#else
#define KF_FAT_HOPPER_INSTANCES(TILE_N)      \
  KF_FAT_HOPPER_INSTANCE(bf16, TILE_N, false) \
  KF_FAT_HOPPER_INSTANCE(bf16, TILE_N, true)  \
  KF_FAT_HOPPER_INSTANCE(f16, TILE_N, false)  \
  KF_FAT_HOPPER_INSTANCE(f16, TILE_N, true)
#endif
