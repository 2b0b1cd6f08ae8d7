// The instances of the kernel behind shrink and mix, for introspection: a warp's rows by a block's columns. Stages and
// shared memory follow the call's sizes (contraction_plan.cpp); here they are those of factors with 320 values of k.
#pragma once

#include "common/configs.h"
#include "cuda/kron_linear/contraction_plan.h"

namespace kronafuse::cuda {

constexpr Configuration contraction_configuration(const char* name, Neighbours neighbours, int column_tiles, int tile_k,
                                                  int stages) {
  const int64_t bytes = contraction_shared_bytes(neighbours, column_tiles, tile_k, stages, 1, 320);
  return {name, contraction_rows(neighbours, column_tiles), column_tiles * 8, tile_k, stages, kContractionThreads,
          static_cast<int>(bytes)};
}

inline constexpr Configuration shrink_configurations[] = {
    contraction_configuration("k_16x16", Neighbours::k, 2, 64, 4),
    contraction_configuration("k_16x32", Neighbours::k, 4, 64, 4),
    contraction_configuration("k_32x96", Neighbours::k, 12, 64, 3),
};

inline constexpr Configuration mix_configurations[] = {
    contraction_configuration("rows_64x16", Neighbours::rows, 2, 16, 4),
    contraction_configuration("rows_64x32", Neighbours::rows, 4, 16, 4),
};

}  // namespace kronafuse::cuda
