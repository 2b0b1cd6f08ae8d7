// What a block of the plain form works on: operands in global memory, the tile, and how the threads share it.
#pragma once

#include <cstdint>

#include "cuda/common/platform.cuh"
#include "cuda/kron_linear/linear.h"

namespace kronafuse::cuda::plain {

// One factor of a product over k, in global memory.
struct Operand {
  const void* data = nullptr;
  int64_t stride_row = 0;
  int64_t stride_k = 0;
  bool is_float32 = false;  // rounded to the compute dtype as it is read
  bool copied = false;      // its chunks of eight elements lie together and aligned: asynchronous copies take them
};

// y += a bᵀ over `length` values of k.
struct Segment {
  Operand a;  // rows are tokens
  Operand b;  // rows are features
  int length = 0;
};

// Columns of a tile to features of y: neighbours in A ⊗ B are `left` apart in a shuffled y.
struct Columns {
  int count = 0;  // N
  int left = 1;   // N1
  int right = 1;  // N2
  bool permuted = false;

  KF_DEVICE int feature(int column) const {
    return permuted ? (column % right) * left + column / right : column;
  }
};

// What the loop over k walks: the groups of I ⊗ B that the tile touches, then the dense pairs, x and W last.
struct Work {
  int tokens = 0;
  Columns columns;
  bool has_block = false;
  Segment block;               // a: group 0 of inner; b: up
  int64_t block_group_stride = 0;  // of inner, from one n1 to the next
  int count = 0;               // of segments
  Segment segments[kDenseTails + 1];
};

// A tile and how the threads share it.
template <class Element, int TileM, int TileN, int TileK, int Stages, int WarpsM, int WarpsN, bool TransposedB>
struct Traits {
  using T = Element;
  static constexpr int kTileM = TileM, kTileN = TileN, kTileK = TileK, kStages = Stages;
  static constexpr int kWarpsM = WarpsM, kWarpsN = WarpsN, kThreads = WarpsM * WarpsN * 32;
  static constexpr bool kTransposedB = TransposedB;  // features of b are neighbours in memory, not values of k

  static constexpr int kChunk = 8;  // elements in 16 bytes
  static constexpr int kChunksK = TileK / kChunk, kChunksN = TileN / kChunk;
  static constexpr int kAChunks = TileM * kChunksK / kThreads, kBChunks = TileN * kChunksK / kThreads;  // a thread's
  static constexpr int kABytes = TileM * TileK * 2, kStageBytes = (TileM + TileN) * TileK * 2;

  static constexpr int kWarpM = TileM / WarpsM, kWarpN = TileN / WarpsN;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  // Blocks of a multiprocessor that registers must leave room for.
  static constexpr int kBlocks = 512 / kThreads / (kFragmentsM * kFragmentsN > 16 ? 2 : 1);

  // Chunks in a row of b's tile, and rows of each tile that all threads copy at a time.
  static constexpr int kBPerRow = TransposedB ? kChunksN : kChunksK;
  static constexpr int kARows = kThreads / kChunksK, kBRows = kThreads / kBPerRow;

  static_assert(TileK == 32 || TileK == 64, "swizzles are for rows of 64 or 128 bytes");
  static_assert(kAChunks * kARows == TileM && kBChunks * kBRows == (TransposedB ? TileK : TileN), "threads copy alike");
  static_assert(kARows % 8 == 0 && kBRows % 8 == 0, "and each swizzles alike in all its rows");
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "b fragments are read in pairs");

  // Where a chunk lies in its row, so that eight rows of one column are in different banks. Rows 8 apart swizzle alike.
  static KF_DEVICE int swizzle_k(int row, int chunk) {
    return TileK == 64 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
  }
  static KF_DEVICE int swizzle_n(int row, int chunk) { return chunk ^ (row & 7); }

  // Byte offset of a chunk in a tile whose rows hold TileK values of k, and in one whose rows hold TileN features.
  static KF_DEVICE int offset_k(int row, int chunk) { return (row * kChunksK + swizzle_k(row, chunk)) * 16; }
  static KF_DEVICE int offset_n(int row, int chunk) { return (row * kChunksN + swizzle_n(row, chunk)) * 16; }
  static KF_DEVICE int offset_b(int row, int chunk) {
    return TransposedB ? offset_n(row, chunk) : offset_k(row, chunk);
  }
};

template <class Traits>
using Accumulators = float[Traits::kFragmentsM][Traits::kFragmentsN][4];

}  // namespace kronafuse::cuda::plain
