// The K loop: one thread fetches the stages of all operand pairs in a row, two warpgroups multiply whatever arrives.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/kron_linear/sm90a/problem.cuh"
#include "cuda/kron_linear/sm90a/shared.cuh"

namespace kronafuse::cuda {

// Where the parts of a tile of W or L lie in its stage.
template <class Traits>
struct HopperB {
  static constexpr Swizzle kSwizzle = hopper_b_swizzle(Traits::kForm, Traits::kTransposed);
  static constexpr int kBoxInner = hopper_b_box_inner(Traits::kForm, Traits::kTransposed);
  static constexpr int kBoxes = Traits::kTransposed ? Traits::kTileN / kBoxInner : 1;
  static constexpr int kBoxBytes = kBoxInner * kHopperBlockK * 2;  // of a transposed tile
  static constexpr int kStepBytes = Traits::kTransposed ? 16 * span_of(kSwizzle) : 32;
};

template <class Traits>
KF_DEVICE void fetch_b(const HopperShared<Traits>& shared, const TensorMap& map, int stage, int n, int k, int cluster,
                       int rank) {
  using B = HopperB<Traits>;
  static_assert(kHopperClusters == 2, "a shift stands for the division by the number of blocks");
  const int rows = hopper_b_box_outer(Traits::kForm, Traits::kTransposed, 1) >> (cluster - 1);
  const auto mask = static_cast<uint16_t>((1 << cluster) - 1);
  uint64_t* full = &shared.extra().full[stage];
#pragma unroll
  for (int box = 0; box < B::kBoxes; ++box) {
    unsigned char* to = shared.b(stage) + box * B::kBoxBytes + rank * rows * span_of(B::kSwizzle);
    const int inner = Traits::kTransposed ? n + box * B::kBoxInner : k;
    const int outer = (Traits::kTransposed ? k : n) + rank * rows;
    if (cluster > 1) {
      tma_load_multicast(to, map, inner, outer, full, mask);
    } else {
      tma_load(to, map, inner, outer, full);
    }
  }
}

// The producer, one thread: the stages of every tile of this block, one segment of K after the other.
template <class Traits>
KF_DEVICE void fetch(const HopperProblem& problem, const HopperShared<Traits>& shared, int first_tile, int rank) {
  const TileSchedule& schedule = problem.schedule;
  for (int index = 0; index < problem.segment_count; ++index) {
    tma_prefetch(problem.segments[index].a);
    tma_prefetch(problem.segments[index].b);
  }
  HopperRing<Traits> ring;
  for (int tile = first_tile; tile < schedule.count(); tile += schedule.clusters) {
    const TileOrigin origin = schedule.origin(tile, rank);
    for (int index = 0; index < problem.segment_count; ++index) {
      const Segment& segment = problem.segments[index];
      int n1 = origin.n / segment.period;
      for (int pass = 0; pass < segment.passes; ++pass, ++n1) {
        const int n2 = origin.n - n1 * segment.period;
        for (int k = 0; k < segment.width; k += kHopperBlockK) {
          uint64_t* full = &shared.extra().full[ring.stage];
          mbarrier_wait(&shared.extra().empty[ring.stage], ring.parity ^ 1);
          const int left = (segment.width - k + 15) / 16;
          shared.extra().steps[ring.stage] = left < kHopperSteps ? left : kHopperSteps;
          mbarrier_arrive_expect(full, Traits::kStageBytes);
          tma_load_3d(shared.a(ring.stage), segment.a, k, n1, origin.m, full);
          fetch_b(shared, segment.b, ring.stage, n2, k, schedule.cluster, rank);
          ring.advance();
        }
      }
    }
  }
}

// After the last read of a stage by this warp: says so to every block whose producer writes into it.
template <class Traits>
KF_DEVICE void release(const HopperShared<Traits>& shared, int stage, int cluster) {
  sync_warp();
  if (lane() < cluster) mbarrier_arrive_cluster(&shared.extra().empty[stage], static_cast<uint32_t>(lane()));
}

template <class Traits>
KF_DEVICE void multiply_step(float (&acc)[Traits::kBlocks][Traits::kTileN / 2], uint64_t a, uint64_t b, int step,
                             bool accumulate) {
#pragma unroll
  for (int block = 0; block < Traits::kBlocks; ++block) {
    wgmma_m64k16<Traits::kTileN, typename Traits::T, Traits::kTransposed>(
        acc[block], wgmma_advance(a, block * 64 * 128 + step * 32),
        wgmma_advance(b, step * HopperB<Traits>::kStepBytes), accumulate);
  }
}

// A consumer, one warpgroup: acc = Σ over the tile's stages of A Bᵀ, from row `row` of A on. It cannot see which
// operands they are of; of a stage at the end of a segment it takes the steps of 16 that hold something. The last
// stage's products still run.
template <class Traits>
KF_DEVICE void multiply(float (&acc)[Traits::kBlocks][Traits::kTileN / 2], const HopperShared<Traits>& shared,
                        HopperRing<Traits>& ring, int row, int k_blocks, int cluster) {
  int before = ring.stage;
#pragma unroll 1
  for (int k_block = 0; k_block < k_blocks; ++k_block) {
    mbarrier_wait(&shared.extra().full[ring.stage], ring.parity);
    const int steps = shared.extra().steps[ring.stage];
    const uint64_t a = wgmma_descriptor_k_major(shared.a(ring.stage) + row * 128);
    const uint64_t b = Traits::kTransposed
                           ? wgmma_descriptor_mn_major(shared.b(ring.stage), kHopperBlockK, HopperB<Traits>::kSwizzle)
                           : wgmma_descriptor_k_major(shared.b(ring.stage));
    if (steps == kHopperSteps) {
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kHopperSteps; ++step) {
        multiply_step<Traits>(acc, a, b, step, k_block > 0 || step > 0);
      }
      wgmma_commit();
    } else {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        wgmma_fence();
        multiply_step<Traits>(acc, a, b, step, k_block > 0 || step > 0);
        wgmma_commit();
      }
    }
    wgmma_wait<1>();
    if (k_block > 0) release(shared, before, cluster);
    before = ring.stage;
    ring.advance();
  }
}

// Ends what multiply() began: the accumulators may be read, the last stage is free.
template <class Traits>
KF_DEVICE void finish_products(float (&acc)[Traits::kBlocks][Traits::kTileN / 2], const HopperShared<Traits>& shared,
                               const HopperRing<Traits>& ring, int cluster) {
  wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < Traits::kBlocks; ++block) wgmma_fence_operands(acc[block]);
  release(shared, ring.stage == 0 ? Traits::kStages - 1 : ring.stage - 1, cluster);
}

}  // namespace kronafuse::cuda
