// What test_hopper_sass.py must not accept: the Hopper kernel's pieces with a K loop each for [x | W] and for [T | L].
#include "cuda/kron_linear/linear_sm90a.cuh"

namespace kronafuse::cuda {

using Traits = HopperTraits<bf16, 0, false>;

KF_DEVICE void fetch_alone(const HopperProblem& problem, const Segment& segment, const HopperShared<Traits>& shared,
                           HopperRing<Traits>& ring) {
  for (int k = 0; k < segment.width; k += kHopperBlockK) {
    uint64_t* full = &shared.extra().full[ring.stage];
    mbarrier_wait(&shared.extra().empty[ring.stage], ring.parity ^ 1);
    shared.extra().steps[ring.stage] = kHopperSteps;
    mbarrier_arrive_expect(full, Traits::kStageBytes);
    tma_load_3d(shared.a(ring.stage), segment.a, k, 0, 0, full);
    fetch_b(shared, segment.b, ring.stage, 0, k, problem.schedule.cluster, 0);
    ring.advance();
  }
}

template <class>
__global__ void __launch_bounds__(kHopperThreads, 1) two_loops_kernel(const __grid_constant__ HopperProblem problem) {
  const HopperShared<Traits> shared{dynamic_shared()};
  if (threadIdx.x == 0) shared.initialise(1);
  __syncthreads();
  HopperRing<Traits> ring;
  if (threadIdx.x < 128) {
    registers_decrease<40>();
    if (threadIdx.x == 0) {
      fetch_alone(problem, problem.segments[0], shared, ring);
      fetch_alone(problem, problem.segments[1], shared, ring);
    }
  } else {
    registers_increase<232>();
    float acc[Traits::kBlocks][Traits::kTileN / 2];
    multiply(acc, shared, ring, 0, problem.k_blocks - 1, 1);
    finish_products(acc, shared, ring, 1);
    float tail[Traits::kBlocks][Traits::kTileN / 2];
    multiply(tail, shared, ring, 0, problem.segment_count, 1);
    finish_products(tail, shared, ring, 1);
    for (int i = 0; i < Traits::kTileN / 2; ++i) acc[0][i] += tail[0][i];
    write_chunks<Traits>(acc, shared, 0, 0, false);
  }
}

template __global__ void two_loops_kernel<Traits>(const __grid_constant__ HopperProblem problem);

}  // namespace kronafuse::cuda
