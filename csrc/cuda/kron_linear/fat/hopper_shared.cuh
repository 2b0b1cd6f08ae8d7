// What one instance of the Hopper form is, how its block divides the shared memory, and which tiles of y it computes.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/kron_linear/fat_linear_sm90a.h"

namespace kronafuse::cuda {

template <class T_, int TILE_N, bool TRANSPOSED>
struct FatHopperTraits {
  using T = T_;
  static constexpr int kTileN = TILE_N;
  static constexpr bool kTransposed = TRANSPOSED;
  static constexpr int kStages = fat_hopper_stages(TILE_N);
  static constexpr int kXBytes = kFatHopperTileM * kFatHopperBlockK * 2;
  static constexpr int kStageBytes = fat_hopper_stage_bytes(TILE_N);
  static constexpr int kRightBytes = fat_hopper_right_bytes(TILE_N);
  static constexpr Swizzle kSwizzle = fat_hopper_swizzle(TILE_N, TRANSPOSED);
  static constexpr int kBoxColumns = fat_hopper_box_columns(TILE_N);
  static constexpr int kBoxBytes = kBoxColumns * kFatHopperBlockK * 2;
  static constexpr int kStepBytes = TRANSPOSED ? 16 * span_of(kSwizzle) : 32;  // of W's tile, from 16 k to the next
};

constexpr int kFatHopperSteps = kFatHopperBlockK / 16;
constexpr int kFatHopperLoaders = 96;
// 72 · 128 + 216 · 256 registers are what the block starts with.
constexpr int kFatHopperProducerRegisters = 72;
constexpr int kFatHopperConsumerRegisters = 216;

template <class Traits>
struct FatHopperShared {
  struct Barriers {
    uint64_t full[Traits::kStages];
    uint64_t empty[Traits::kStages];
    uint64_t right_full[kFatHopperRightBuffers];
    uint64_t right_empty[kFatHopperRightBuffers];
  };
  static_assert(sizeof(Barriers) <= kFatHopperExtraBytes);
  unsigned char* first;

  KF_DEVICE unsigned char* x(int stage) const { return first + stage * Traits::kStageBytes; }
  KF_DEVICE unsigned char* weight(int stage) const { return x(stage) + Traits::kXBytes; }
  KF_DEVICE unsigned char* right(int buffer) const {
    return first + Traits::kStages * Traits::kStageBytes + buffer * Traits::kRightBytes;
  }
  KF_DEVICE Barriers& barriers() const { return *reinterpret_cast<Barriers*>(right(kFatHopperRightBuffers)); }

  // By one thread.
  KF_DEVICE void initialise() const {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(&barriers().full[stage], 1);
      mbarrier_init(&barriers().empty[stage], 4 * kFatHopperConsumers);
    }
    for (int buffer = 0; buffer < kFatHopperRightBuffers; ++buffer) {
      mbarrier_init(&barriers().right_full[buffer], kFatHopperLoaders);
      mbarrier_init(&barriers().right_empty[buffer], 4 * kFatHopperConsumers);
    }
  }
};

// A place in a ring, and the parity of its round.
template <int COUNT>
struct FatRing {
  int index = 0;
  uint32_t parity = 0;
  KF_DEVICE void advance() {
    if (++index == COUNT) {
      index = 0;
      parity ^= 1u;
    }
  }
};

// Where a tile's rows and columns begin. kBand rows of tiles before the next column, so that neighbours share W in L2.
struct FatHopperTile {
  int first_m, left_out, right_out;

  KF_DEVICE FatHopperTile(const FatParameters& p, int64_t index, int tile_n) {
    constexpr int64_t kBand = 16;
    const int64_t band = index / (kBand * p.n_blocks), inside = index % (kBand * p.n_blocks);
    const int64_t rows = p.m_blocks - band * kBand < kBand ? p.m_blocks - band * kBand : kBand;
    first_m = static_cast<int>(band * kBand + inside % rows) * kFatHopperTileM;
    const int unit = static_cast<int>(inside / rows), per_group = static_cast<int>(p.units_per_group);
    left_out = unit / per_group;
    right_out = unit % per_group * tile_n;
  }
};

}  // namespace kronafuse::cuda
