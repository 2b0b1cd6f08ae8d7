// y's way out: a consumer adds bias and base to its accumulators and rounds them into a slot of shared memory; a warp
// of its own brings base and bias there beforehand and stores the slot afterwards.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/kron_linear/sm90a/problem.cuh"
#include "cuda/kron_linear/sm90a/shared.cuh"

namespace kronafuse::cuda {

// The chunks of one consumer's tiles in the order in which it writes them.
template <class Traits>
struct ChunkWalk {
  const HopperProblem& problem;
  int consumer;
  int rank;
  int tile;
  int step;
  TileOrigin origin;
  int chunk = 0;
  int round = 0;  // of the slots

  KF_DEVICE ChunkWalk(const HopperProblem& problem, int consumer, int rank, int first_tile)
      : problem(problem), consumer(consumer), rank(rank) {
    const int clusters = problem.schedule.clusters;
    tile = first_tile + (Traits::kPingPong ? consumer * clusters : 0);
    step = Traits::kPingPong ? kHopperConsumers * clusters : clusters;
    find_origin();
  }

  KF_DEVICE bool valid() const { return tile < problem.schedule.count(); }
  KF_DEVICE int slot() const { return chunk % Traits::kSlots; }
  KF_DEVICE uint32_t parity() const { return static_cast<uint32_t>(round) & 1u; }
  KF_DEVICE bool narrow() const { return Traits::kNarrow && slot() == Traits::kSlots - 1; }
  KF_DEVICE int m() const {
    return origin.m + (Traits::kPingPong ? 0 : consumer * Traits::kConsumerM) + chunk / Traits::kChunksPerRow * 64;
  }
  KF_DEVICE int n() const { return origin.n + chunk % Traits::kChunksPerRow * kHopperChunkN; }

  KF_DEVICE void next() {
    if (++chunk % Traits::kSlots == 0) ++round;
    if (chunk == Traits::kChunks) {
      chunk = 0;
      tile += step;
      find_origin();
    }
  }
  KF_DEVICE void find_origin() {
    if (valid()) origin = problem.schedule.origin(tile, rank);
  }
};

// Element n of the bias, in float, or 0 where there is none.
template <class T>
KF_DEVICE float bias_at(const HopperProblem& problem, int n) {
  if (problem.bias == nullptr || n >= problem.n) return 0.0f;
  const int64_t index = n * problem.bias_stride;
  return problem.bias_is_float ? static_cast<const float*>(problem.bias)[index]
                               : to_float(static_cast<const T*>(problem.bias)[index]);
}

// Brings bias and base to the slot of the walk's chunk; one warp, when nothing reads the slot any more.
template <class Traits>
KF_DEVICE void prepare_slot(const ChunkWalk<Traits>& walk, const HopperShared<Traits>& shared) {
  const HopperProblem& problem = walk.problem;
  const int slot = walk.slot();
  for (int column = lane(); column < kHopperChunkN; column += 32) {
    shared.extra().bias[walk.consumer][slot][column] = bias_at<typename Traits::T>(problem, walk.n() + column);
  }
  sync_warp();
  if (lane() == 0) {
    uint64_t* ready = &shared.extra().ready[walk.consumer][slot];
    if (problem.has_base) {
      const int columns = walk.narrow() ? Traits::kNarrow : kHopperChunkN;
      mbarrier_arrive_expect(ready, static_cast<uint32_t>(64 * columns * 2));
      tma_load(shared.slot(walk.consumer, slot), walk.narrow() ? problem.base_narrow : problem.base, walk.n(), walk.m(),
               ready);
    } else {
      mbarrier_arrive(ready);
    }
  }
}

// The storing warp of one consumer.
template <class Traits>
KF_DEVICE void store_results(const HopperProblem& problem, const HopperShared<Traits>& shared, int consumer,
                             int first_tile, int rank) {
  ChunkWalk<Traits> coming(problem, consumer, rank, first_tile);
  ChunkWalk<Traits> stored = coming;
#pragma unroll 1
  for (int slot = 0; slot < Traits::kSlots && coming.valid(); ++slot, coming.next()) prepare_slot(coming, shared);
#pragma unroll 1
  for (; stored.valid(); stored.next()) {
    mbarrier_wait(&shared.extra().written[consumer][stored.slot()], stored.parity());
    if (lane() == 0) {
      tma_store(stored.narrow() ? problem.y_narrow : problem.y, shared.slot(consumer, stored.slot()), stored.n(),
                stored.m());
      tma_store_commit();
      tma_store_wait_read<0>();
    }
    sync_warp();
    if (coming.valid()) {
      prepare_slot(coming, shared);
      coming.next();
    }
  }
}

// Adds bias and base to 64 rows by `Columns` columns of accumulators (from element First on) and rounds the sum into
// the slot.
template <class Traits, int First, int Columns>
KF_DEVICE void write_chunk(const float (&acc)[Traits::kTileN / 2], unsigned char* slot, const float* bias,
                           bool has_base) {
  using T = typename Traits::T;
  constexpr Swizzle swizzle = Columns == kHopperChunkN ? Swizzle::b128 : Swizzle::b64;
  const int row = warp_index() % 4 * 16 + lane() / 4;
  const int column = lane() % 4 * 2;
#pragma unroll
  for (int j = 0; j < Columns / 8; ++j) {
    const Float2 added = *reinterpret_cast<const Float2*>(bias + j * 8 + column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t offset = static_cast<uint32_t>((row + half * 8) * Columns + j * 8 + column) * 2;
      auto* at = reinterpret_cast<uint32_t*>(slot + swizzled(offset, swizzle));
      float low = acc[First + j * 4 + half * 2] + added.x;
      float high = acc[First + j * 4 + half * 2 + 1] + added.y;
      if (has_base) {
        const Float2 base = unpack2<T>(*at);
        low += base.x;
        high += base.y;
      }
      // The one rounding of y.
      *at = pack2<T>(low, high);
    }
  }
}

template <class Traits, int Chunk = 0>
KF_DEVICE void write_chunks(const float (&acc)[Traits::kBlocks][Traits::kTileN / 2], const HopperShared<Traits>& shared,
                            int consumer, int round, bool has_base) {
  if constexpr (Chunk < Traits::kChunks) {
    constexpr int slot = Chunk % Traits::kSlots;
    constexpr int first = Chunk % Traits::kChunksPerRow * (kHopperChunkN / 2);
    mbarrier_wait(&shared.extra().ready[consumer][slot], static_cast<uint32_t>(round + Chunk / Traits::kSlots) & 1u);
    write_chunk<Traits, first, Traits::chunk_columns(Chunk)>(acc[Chunk / Traits::kChunksPerRow],
                                                             shared.slot(consumer, slot),
                                                             shared.extra().bias[consumer][slot], has_base);
    fence_async_shared();
    sync_warp();
    if (lane() == 0) mbarrier_arrive(&shared.extra().written[consumer][slot]);
    write_chunks<Traits, Chunk + 1>(acc, shared, consumer, round, has_base);
  }
}

}  // namespace kronafuse::cuda
