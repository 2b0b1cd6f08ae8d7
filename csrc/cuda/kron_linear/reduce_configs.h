// Tiles of the factor gradients, for the host: tile_m × tile_n of the gradient, tile_k rows a step.
#pragma once

#include "common/configs.h"

namespace kronafuse::cuda {

// Of one operand's part of a stage, in either orientation; each line ends in 16 bytes that spread lines over the banks.
constexpr int reduce_operand_bytes(int features, int rows) {
  const int by_rows = rows * (2 * features + 16);
  const int by_features = features * (2 * rows + 16);
  return by_rows > by_features ? by_rows : by_features;
}

constexpr int reduce_shared_bytes(int tile_p, int tile_q, int rows, int stages) {
  return stages * (reduce_operand_bytes(tile_p, rows) + reduce_operand_bytes(tile_q, rows));
}

enum ReduceForm : int { kReduceTiny, kReduceNarrow, kReduceMedium, kReduceWide };

// Tiny and narrow serve gradients with a side up to 16 (A of LoKr, rank 16), wide those with both sides above 64.
inline constexpr Configuration reduce_configurations[] = {
    {"tiny_16x16", 16, 16, 256, 3, 256, reduce_shared_bytes(16, 16, 256, 3)},
    {"narrow_16x64", 16, 64, 128, 3, 128, reduce_shared_bytes(16, 64, 128, 3)},
    {"medium_64x64", 64, 64, 64, 3, 128, reduce_shared_bytes(64, 64, 64, 3)},
    {"wide_160x160", 160, 160, 64, 2, 256, reduce_shared_bytes(160, 160, 64, 2)},
};

}  // namespace kronafuse::cuda
