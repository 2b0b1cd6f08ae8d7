// What one instance of the Hopper kernel is, and how its block divides the shared memory.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/types.cuh"
#include "cuda/kron_linear/configs_sm90a.h"

namespace kronafuse::cuda {

// Form: an index of kHopperForms. Transposed: W and L are read with N contiguous, (K, N) in memory.
template <class T_, int Form, bool Transposed_>
struct HopperTraits {
  using T = T_;
  static constexpr HopperForm kForm = kHopperForms[Form];
  static constexpr bool kTransposed = Transposed_;
  static constexpr bool kPingPong = kForm.ping_pong;
  static constexpr int kTileM = kForm.tile_m;
  static constexpr int kTileN = kForm.tile_n;
  static constexpr int kStages = hopper_stages(kForm);
  static constexpr int kABytes = kTileM * kHopperBlockK * 2;
  static constexpr int kStageBytes = hopper_stage_bytes(kForm);

  // What one consumer multiplies: kBlocks times 64 rows.
  static constexpr int kConsumerM = kPingPong ? kTileM : kTileM / kHopperConsumers;
  static constexpr int kBlocks = kConsumerM / 64;

  // Chunks of y, 64 rows by kHopperChunkN columns or what is left of the tile.
  static constexpr int kChunksPerRow = hopper_chunks_per_row(kForm);
  static constexpr int kChunks = kBlocks * kChunksPerRow;
  static constexpr int kNarrow = kTileN % kHopperChunkN;
  static constexpr int kSlots = hopper_slots(kForm);
  static constexpr int kSlotBytes = 64 * kHopperChunkN * 2;
  static_assert(kConsumerM % 64 == 0 && kChunks % kSlots == 0 && (!kNarrow || kSlots == kChunksPerRow));

  static constexpr int chunk_columns(int chunk) {
    return kNarrow && chunk % kChunksPerRow == kChunksPerRow - 1 ? kNarrow : kHopperChunkN;
  }
};

template <class Traits>
struct HopperShared {
  // Written whole by one side of a barrier and read by the other.
  struct Extra {
    uint64_t full[Traits::kStages];
    uint64_t empty[Traits::kStages];
    uint64_t turn[kHopperConsumers];
    uint64_t ready[kHopperConsumers][Traits::kSlots];
    uint64_t written[kHopperConsumers][Traits::kSlots];
    float bias[kHopperConsumers][Traits::kSlots][kHopperChunkN];
    int steps[Traits::kStages];
  };
  static_assert(sizeof(Extra) <= kHopperSharedExtra);

  unsigned char* first;

  KF_DEVICE unsigned char* a(int stage) const { return first + stage * Traits::kStageBytes; }
  KF_DEVICE unsigned char* b(int stage) const { return a(stage) + Traits::kABytes; }
  KF_DEVICE unsigned char* slot(int consumer, int slot) const {
    return first + Traits::kStages * Traits::kStageBytes + consumer * hopper_staging_bytes(Traits::kForm) +
           slot * Traits::kSlotBytes;
  }
  KF_DEVICE Extra& extra() const {
    return *reinterpret_cast<Extra*>(first + Traits::kStages * Traits::kStageBytes +
                                     kHopperConsumers * hopper_staging_bytes(Traits::kForm));
  }

  // By one thread.
  KF_DEVICE void initialise(int cluster) const {
    constexpr int warps = Traits::kPingPong ? 4 : 4 * kHopperConsumers;
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(&extra().full[stage], 1);
      mbarrier_init(&extra().empty[stage], warps * cluster);
    }
    for (int consumer = 0; consumer < kHopperConsumers; ++consumer) {
      mbarrier_init(&extra().turn[consumer], 1);
      for (int slot = 0; slot < Traits::kSlots; ++slot) {
        mbarrier_init(&extra().ready[consumer][slot], 1);
        mbarrier_init(&extra().written[consumer][slot], 4);
      }
    }
  }
};

// The place of one side of the ring of stages, and the parity of its round.
template <class Traits>
struct HopperRing {
  int stage = 0;
  uint32_t parity = 0;

  KF_DEVICE void advance() {
    if (++stage == Traits::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  KF_DEVICE void advance(int count) {
    const int end = stage + count;
    parity ^= static_cast<uint32_t>(end / Traits::kStages) & 1u;
    stage = end % Traits::kStages;
  }
};

}  // namespace kronafuse::cuda
