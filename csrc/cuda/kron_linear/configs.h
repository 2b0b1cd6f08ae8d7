// Tiles of the GEMM with tails, for the host.
#pragma once

#include "common/configs.h"

namespace kronafuse::cuda {

namespace plain {

// Bytes of the pipeline's stages, or of the slabs through which the warps store, whichever is more, and a value for
// each feature of the tile.
constexpr int shared_bytes(int tile_m, int tile_n, int tile_k, int stages, int warps, int warp_n) {
  const int pipeline = (tile_m + tile_n) * tile_k * 2 * stages;
  const int slabs = warps * 16 * (warp_n + 8) * 4;
  return (pipeline > slabs ? pipeline : slabs) + tile_n * 4;
}

}  // namespace plain

// The plain form of `linear`, on sm_80 and later. The first serves large problems: warps of 64 × 64, so that shared
// memory feeds the tensor cores, two blocks on a multiprocessor of 100 KB or more. The second those with few tiles.
inline constexpr Configuration linear_configurations[] = {
    {"plain_128x128", 128, 128, 32, 3, 128, plain::shared_bytes(128, 128, 32, 3, 4, 64)},
    {"plain_64x64", 64, 64, 64, 3, 128, plain::shared_bytes(64, 64, 64, 3, 4, 32)},
};
inline constexpr int linear_configuration_count = sizeof(linear_configurations) / sizeof(linear_configurations[0]);

}  // namespace kronafuse::cuda
