// Tiles of the Hopper form of fat_linear: which there are, how many stages fit, what a block takes. Read by the host and
// by the kernel.
//
// Source: derived (shared memory and registers); no row has been measured yet.
#pragma once

#include "common/configs.h"

namespace kronafuse::cuda {

constexpr int kFatHopperTileM = 128;
constexpr int kFatHopperBlockK = 64;  // 128 bytes of 16-bit elements: a row of the widest swizzle
constexpr int kFatHopperConsumers = 2;
constexpr int kFatHopperThreads = 128 * (1 + kFatHopperConsumers);
constexpr int kFatHopperRightBuffers = 2;
constexpr int kFatHopperExtraBytes = 256;  // barriers
constexpr int kFatHopperMostStages = 6;

constexpr int fat_hopper_right_bytes(int tile_n) { return tile_n * kFatHopperBlockK * 2; }

constexpr int fat_hopper_stage_bytes(int tile_n) { return (kFatHopperTileM + tile_n) * kFatHopperBlockK * 2; }

constexpr int fat_hopper_stages(int tile_n) {
  const int fitting = (227 * 1024 - kFatHopperExtraBytes - kFatHopperRightBuffers * fat_hopper_right_bytes(tile_n)) /
                      fat_hopper_stage_bytes(tile_n);
  return fitting < kFatHopperMostStages ? fitting : kFatHopperMostStages;
}

constexpr int fat_hopper_shared_bytes(int tile_n) {
  return fat_hopper_stages(tile_n) * fat_hopper_stage_bytes(tile_n) +
         kFatHopperRightBuffers * fat_hopper_right_bytes(tile_n) + kFatHopperExtraBytes;
}

constexpr Configuration fat_hopper_configuration(const char* name, int tile_n) {
  return {name,
          kFatHopperTileM,
          tile_n,
          kFatHopperBlockK,
          fat_hopper_stages(tile_n),
          kFatHopperThreads,
          fat_hopper_shared_bytes(tile_n)};
}

// The columns of a tile lie in one group of O2 features.
constexpr int kFatHopperTilesN[] = {96, 128, 160, 192};
constexpr int kFatHopperRows = sizeof(kFatHopperTilesN) / sizeof(int);

inline constexpr Configuration fat_linear_sm90a_configurations[] = {
    fat_hopper_configuration("128x96", 96),
    fat_hopper_configuration("128x128", 128),
    fat_hopper_configuration("128x160", 160),
    fat_hopper_configuration("128x192", 192),
};
static_assert(sizeof(fat_linear_sm90a_configurations) / sizeof(Configuration) == kFatHopperRows);

}  // namespace kronafuse::cuda
