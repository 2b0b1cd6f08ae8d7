// What the fat kernel is told, and where the columns of a block lie.
#pragma once

#include "cuda/common/platform.cuh"
#include "cuda/common/types.cuh"
#include "cuda/kron_linear/fat_linear_configs.h"

namespace kronafuse::cuda {

// Strides in elements: _m of rows, _1 and _2 of the left and right index of the output's features, _k1 and _k2 of the
// input's. Features of the output are counted by unit: the columns of one warp, all in one group of O2.
struct FatParameters {
  const void* x;
  const void* weight;
  const void* bias;
  const void* base;
  const void* a;
  const void* b;
  const void* in_scale;
  const void* out_scale;
  const void* scale_tensor;
  void* y;
  int64_t tokens;
  int64_t m_blocks, n_blocks;
  int64_t units, units_per_group;
  int left_in, right_in, left_out, right_out;  // I1, I2, O1, O2
  float scale;
  DType scale_dtype, bias_dtype, in_scale_dtype, out_scale_dtype;
  bool a_float32, b_float32;
  // Whether 16 bytes can be moved at a time, along k, along B's dense side, along o2.
  bool x_vectors, w_vectors, b_vectors, base_vectors, y_vectors;
  bool b_transposed;  // whether o2 is B's dense side
  int64_t x_m, x_1, x_2;
  int64_t w_1, w_2, w_k1, w_k2;
  int64_t bias_1, bias_2;
  int64_t base_m, base_1, base_2;
  int64_t a_o, a_i;
  int64_t b_o, b_i;
  int64_t in_1, in_2;
  int64_t out_1, out_2;
  int64_t y_m, y_1, y_2;
};

struct FatColumn {
  int left, right;  // o1, o2
  bool valid;
};

// The columns of a block: kFatWarpsN units side by side in the block, wherever they are in y.
template <class Tile>
struct FatColumns {
  int left[kFatWarpsN], right[kFatWarpsN];  // o1 and the first o2 of each unit; o1 is O1 behind the last one

  KF_DEVICE FatColumns(const FatParameters& p, int64_t n_block) {
#pragma unroll
    for (int i = 0; i < kFatWarpsN; ++i) {
      const int64_t unit = n_block * kFatWarpsN + i;
      left[i] = unit < p.units ? static_cast<int>(unit / p.units_per_group) : p.left_out;
      right[i] = static_cast<int>(unit % p.units_per_group) * Tile::kWarpN;
    }
  }

  KF_DEVICE FatColumn at(const FatParameters& p, int local) const {
    const bool second = local >= Tile::kWarpN;
    const int o1 = second ? left[1] : left[0];
    const int o2 = second ? right[1] + local - Tile::kWarpN : right[0] + local;
    return {o1, o2, o1 < p.left_out && o2 < p.right_out};
  }
};
static_assert(kFatWarpsN == 2);

}  // namespace kronafuse::cuda
