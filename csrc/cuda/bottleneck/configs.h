// Tiles of the bottleneck's kernel, and the shared memory that they take; host code and device code alike.
#pragma once

#include <cstdint>

#include "common/configs.h"

namespace kronafuse::cuda::bottleneck {

constexpr int STEP = 32;      // features of a step of the product into the hidden layer
constexpr int COLUMNS = 64;   // features of a step of the product out of it
constexpr int MAX_WIDTH = 256;
constexpr int MOST_STAGES = 4;
constexpr int MOST_SPLITS = 8;  // blocks that may share rows; each of them computes their hidden layer

// Rows of a block, the widest hidden layer it takes, and its warps along both.
struct Tile {
  const char* name;
  int block_m;
  int width;
  int warps_m;
  int warps_n;

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int warp_columns() const { return COLUMNS / warps_n; }
  // What a warp sends through shared memory at a time on the way to the result.
  constexpr int staged_columns() const { return warp_columns() < 32 ? warp_columns() : 32; }
  constexpr int staging_pitch() const { return staged_columns() + 8; }
  constexpr int staging_bytes() const { return warps_m * warps_n * 16 * staging_pitch() * 4; }
};

constexpr Tile TILES[] = {
    {"wide", 128, 256, 4, 2},
    {"narrow", 128, 64, 8, 1},
    {"small", 32, 256, 2, 4},
};
constexpr int WIDE = 0, NARROW = 1, SMALL = 2, TILE_COUNT = 3;

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where the parts of a block's shared memory begin, in bytes, and how deep its rings are.
struct SharedLayout {
  int hidden_pitch;   // elements of a row of a tile along the hidden layer
  int in_bytes;       // one stage's tile of the features, in the compute dtype
  int raw_bytes;      // the same in float32, where they come so
  int first_bytes;    // one stage's tile of the first factor
  int second_bytes;   // one stage's tile of the second factor
  int hidden_bytes;
  int first_stages;
  int second_stages;

  constexpr int stage_bytes() const { return in_bytes + first_bytes + raw_bytes; }
  constexpr int total(const Tile& tile) const {
    const int first = first_stages * stage_bytes();
    const int second = second_stages * second_bytes + tile.staging_bytes();
    return hidden_bytes + (first > second ? first : second);
  }
};

// width: H. backward: the tiles of both factors lie the other way round. float32: the features read are float32.
// The deepest rings within `limit` bytes, two stages at least, whether they fit or not.
constexpr SharedLayout shared_layout(const Tile& tile, int width, bool backward, bool float32, int64_t limit) {
  const int padded = round_up(width, 16), pitch = round_up(width, 64);
  SharedLayout layout{};
  layout.hidden_pitch = pitch;
  layout.in_bytes = tile.block_m * STEP * 2;
  layout.raw_bytes = float32 ? tile.block_m * STEP * 4 : 0;
  layout.first_bytes = backward ? STEP * pitch * 2 : padded * STEP * 2;
  layout.second_bytes = backward ? padded * COLUMNS * 2 : COLUMNS * pitch * 2;
  layout.hidden_bytes = tile.block_m * pitch * 2;
  layout.first_stages = layout.second_stages = MOST_STAGES;
  while (layout.first_stages > 2 && layout.hidden_bytes + layout.first_stages * layout.stage_bytes() > limit) {
    --layout.first_stages;
  }
  while (layout.second_stages > 2 && layout.total(tile) > limit) --layout.second_stages;
  return layout;
}

constexpr int largest_shared(const Tile& tile, bool backward) {
  return shared_layout(tile, tile.width, backward, false, 0).total(tile);
}

constexpr Configuration configuration(const Tile& tile, bool backward) {
  return {tile.name, tile.block_m, tile.width, STEP, 2, tile.threads(), largest_shared(tile, backward)};
}

}  // namespace kronafuse::cuda::bottleneck

namespace kronafuse::cuda {

inline constexpr Configuration bottleneck_forward_configurations[] = {
    bottleneck::configuration(bottleneck::TILES[bottleneck::WIDE], false),
    bottleneck::configuration(bottleneck::TILES[bottleneck::NARROW], false),
    bottleneck::configuration(bottleneck::TILES[bottleneck::SMALL], false)};
inline constexpr Configuration bottleneck_backward_configurations[] = {
    bottleneck::configuration(bottleneck::TILES[bottleneck::WIDE], true),
    bottleneck::configuration(bottleneck::TILES[bottleneck::NARROW], true),
    bottleneck::configuration(bottleneck::TILES[bottleneck::SMALL], true)};

}  // namespace kronafuse::cuda
