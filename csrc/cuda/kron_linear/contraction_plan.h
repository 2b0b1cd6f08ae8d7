// How a contraction is cut: tiles, the warps' share, the split over k, copies under way. Host only.
#pragma once

#include <cstdint>

#include "cuda/common/stream.h"

namespace kronafuse::cuda {

// What lies together in x: values of k, or rows.
enum class Neighbours { k, rows };

constexpr int kContractionWarps = 8;
constexpr int kContractionThreads = 32 * kContractionWarps;
constexpr int kContractionStagingBytes = 1280;  // a warp's, to store its results through

// Rows of x that a warp holds at a time.
constexpr int contraction_rows(Neighbours neighbours, int column_tiles) {
  return neighbours == Neighbours::rows ? 64 : column_tiles > 4 ? 32 : 16;
}

// Bytes of a line of shared memory: an odd number of 16, so that eight lines below each other are in different banks.
constexpr int64_t contraction_pitch(int64_t elements) { return (elements / 8 | 1) * 16; }

constexpr int64_t contraction_stage_bytes(Neighbours neighbours, int rows, int tile_k) {
  return neighbours == Neighbours::k ? rows * contraction_pitch(tile_k) : tile_k * contraction_pitch(rows);
}

// A block's: `k` values of the factors, the stages of all warps, and what they add up where they share a row's k.
constexpr int64_t contraction_shared_bytes(Neighbours neighbours, int column_tiles, int tile_k, int stages, int warps_k,
                                           int64_t k) {
  const int rows = contraction_rows(neighbours, column_tiles);
  const int64_t sums = warps_k == 1 ? 0 : int64_t{rows} * column_tiles * 8 * 4;
  const int64_t warp = stages * contraction_stage_bytes(neighbours, rows, tile_k) + kContractionStagingBytes + sums;
  return column_tiles * 8 * contraction_pitch(k) + kContractionWarps * warp;
}

struct ContractionPlan {
  int column_tiles;     // of 8, a block's
  int column_blocks;
  int tile_k;           // values of k in one stage of a warp; a multiple of 16
  int tiles;            // of k in all
  int tiles_per_split;
  int splits;           // blocks that share a row's k: their sums are added by a second kernel
  int warps_k;          // warps of a block that share a row's k
  int positions;        // tiles of a warp for one set of rows
  int part_positions;  // of these, how many the factors in shared memory serve at a time
  int stages;
  int factor_pitch;     // bytes from one row of a factor to the next, in shared memory
  int x_pitch;          // bytes from one row of a tile of x to the next
  int stage_bytes;
  int shared_bytes;
  int blocks;           // along the rows

  constexpr int groups() const { return kContractionWarps / warps_k; }
  constexpr bool factors_stay() const { return part_positions >= positions; }
};

// columns: Σ of the factors' rows, each rounded up to 8.  splitting: whether there may be splits.
ContractionPlan plan_contraction(Neighbours neighbours, int64_t rows, int64_t columns, int64_t k, bool splitting,
                                 const DeviceInfo& device);

}  // namespace kronafuse::cuda
