// What the parts of the contraction's kernel share: its traits, and where rows, scales and factors lie.
#pragma once

#include <cstdint>

#include "cuda/common/scale.cuh"
#include "cuda/common/types.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/kron_linear/contraction_parameters.h"

namespace kronafuse::cuda {

template <class Element, Neighbours Together, int ColumnTiles>
struct ContractionTraits {
  using T = Element;
  static constexpr Neighbours kNeighbours = Together;
  static constexpr bool kRowsTogether = Together == Neighbours::rows;
  static constexpr int kColumnTiles = ColumnTiles;
  static constexpr int kRows = contraction_rows(Together, ColumnTiles);
  static constexpr int kRowTiles = kRows / 16;
  static constexpr int kSums = kRowTiles * ColumnTiles * 4;  // a lane's
  static constexpr int kBlocks = kSums <= 64 ? 2 : 1;        // a multiprocessor's, for the bound on registers
  static_assert(ColumnTiles % 2 == 0, "factor fragments are read in pairs");
};

template <class Traits>
using ContractionSums = float[Traits::kRowTiles][Traits::kColumnTiles][4];

KF_DEVICE float scale_at(const ContractionScales& scales, int g, int64_t index) {
  return load_number(scales.data, g * scales.stride_g + index * scales.stride, scales.dtype);
}

// Where row (m, g) begins in an array with these strides; without groups all rows are as far apart.
KF_DEVICE int64_t row_offset(const ContractionGroup& group, int row, int64_t stride_m, int64_t stride_g) {
  if (group.size == 0) return row * stride_g;
  const int m = group.quotient(row);
  return m * stride_m + (row - m * group.size) * stride_g;
}

// Which factor a column tile belongs to.
KF_DEVICE const ContractionSlot& slot_of(const ContractionParameters& p, int tile) {
  int slot = 0;
  while (slot + 1 < p.count && tile >= p.slots[slot + 1].tile) ++slot;
  return p.slots[slot];
}

}  // namespace kronafuse::cuda
