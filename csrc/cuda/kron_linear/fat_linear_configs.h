// Tiles of fat_linear, for its launcher and for introspection.
#pragma once

#include "common/configs.h"

namespace kronafuse::cuda {

constexpr int kFatBlockK = 32;
constexpr int kFatWarpM = 32;
constexpr int kFatWarpsN = 2;

// A block is a column of warps, each kFatWarpM rows high, beside another; the columns of one warp lie in one group of
// O2 features, those of its neighbour may lie in the next.
template <int BLOCK_M, int WARP_N, int STAGES>
struct FatTile {
  static constexpr int kBlockM = BLOCK_M;
  static constexpr int kWarpN = WARP_N;
  static constexpr int kStages = STAGES;
  static constexpr int kBlockN = kFatWarpsN * WARP_N;
  static constexpr int kThreads = BLOCK_M / kFatWarpM * kFatWarpsN * 32;
  static constexpr int kColumnVectors = WARP_N / 8;
  // Of a W tile stored [k][n], in bytes: an odd number of 16, so that 8 rows below each other are in different banks.
  static constexpr int kTransposedPitch = (kBlockN / 8 | 1) * 16;
  static constexpr int kXBytes = BLOCK_M * kFatBlockK * 2;
  static constexpr int kWeightBytes(bool transposed) {
    return transposed ? kFatBlockK * kTransposedPitch : kBlockN * kFatBlockK * 2;
  }
  static constexpr int kStageBytes(bool transposed) { return kXBytes + kWeightBytes(transposed); }

  // B's tile is kept in its own dtype, [n][k] or [k][n] as it is stored; either way rows of 8 elements and 4 pairs fall
  // into different banks. Elements.
  static constexpr int kRightPitch = kFatBlockK + 8;
  static constexpr int kRightPitchTransposed(int bytes) { return kBlockN + 16 / bytes; }
  static constexpr int kRightBytes(int bytes) {
    const int straight = kBlockN * kRightPitch;
    const int transposed = kFatBlockK * kRightPitchTransposed(bytes);
    return (straight > transposed ? straight : transposed) * bytes;
  }

  // A tile of B is asked for STAGES - 1 steps before the last of the I1 steps that end in its use. With fewer than
  // STAGES of them the one before is still in use then.
  static constexpr int right_buffers(int left_in) { return left_in >= STAGES ? 1 : 2; }
  static constexpr int shared_bytes(bool transposed, int left_in, int right_bytes) {
    return STAGES * kStageBytes(transposed) + right_buffers(left_in) * kRightBytes(right_bytes) + kBlockN * 4;
  }

  static constexpr Configuration configuration(const char* name) {
    return {name, BLOCK_M, kBlockN, kFatBlockK, STAGES, kThreads, shared_bytes(true, 2, 4)};
  }
};

using FatWide = FatTile<128, 80, 3>;
using FatSquare = FatTile<128, 64, 4>;
using FatSmall = FatTile<64, 40, 4>;

inline constexpr Configuration fat_linear_configurations[] = {
    FatWide::configuration("128x160"),
    FatSquare::configuration("128x128"),
    FatSmall::configuration("64x80"),
};

}  // namespace kronafuse::cuda
