// Factor gradients, first stage: out (P, Q) = Σ_r p[r, :]ᵀ q[r, :] over a share of the rows r = m·G + g, by mma.sync.
#pragma once

#include <cstdint>

#include "cuda/common/async.cuh"
#include "cuda/common/divide.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/scale.cuh"
#include "cuda/common/types.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/kron_linear/reduce_configs.h"

namespace kronafuse::cuda {

// p or q as the kernel reads it. `piece` elements that lie side by side are copied at once, along features or along
// rows; 0: elements pass through registers, to be scaled and rounded (fp32, a scale) or because of their strides.
struct ReduceOperand {
  const void* data;
  int64_t stride_m, stride_g, stride_f;
  int features;
  int piece;
  bool along_rows;
  bool by_eight;  // for piece 0: eight neighbours can be loaded as vectors of 16 bytes
  bool is_float32;
  const void* scale;  // (G, features) or null
  DType scale_dtype;
  int64_t scale_stride_g, scale_stride_f;
};

struct ReduceParameters {
  ReduceOperand p, q;
  Divider groups;
  int rows;            // M·G
  int steps_per_part;  // a block's share, in steps of kRows rows
  int q_tiles;
  float* partial;  // (parts, P, Q)
};

template <class Element, ReduceForm Form>
struct ReduceTraits {
  using T = Element;
  static constexpr Configuration kConfiguration = reduce_configurations[Form];
  static constexpr int kTileP = kConfiguration.tile_m, kTileQ = kConfiguration.tile_n;
  static constexpr int kRows = kConfiguration.tile_k, kStages = kConfiguration.stages;
  static constexpr int kThreads = kConfiguration.threads, kWarps = kThreads / 32;
  static constexpr int kWarpsP = Form == kReduceWide || Form == kReduceMedium ? 2 : 1;
  static constexpr int kWarpsQ = Form == kReduceWide ? 4 : Form == kReduceMedium ? 2 : 1;
  static constexpr int kWarpsR = kWarps / (kWarpsP * kWarpsQ);  // share the rows of a step
  static constexpr int kTilesP = kTileP / kWarpsP / 16;         // a warp's, of 16 and of 8 features
  static constexpr int kTilesQ = kTileQ / kWarpsQ / 8;
  static constexpr int kRowsOfWarp = kRows / kWarpsR;
  static constexpr int kBytesP = reduce_operand_bytes(kTileP, kRows);
  static constexpr int kStageBytes = kBytesP + reduce_operand_bytes(kTileQ, kRows);
  static_assert(kRowsOfWarp % 16 == 0 && kTileP % (16 * kWarpsP) == 0 && kTileQ % (8 * kWarpsQ) == 0);
  static_assert(kWarpsR == 1 || kWarps * kTileP * kTileQ * 4 <= kStages * kStageBytes);
};

template <class Traits>
using ReduceSums = float[Traits::kTilesP][Traits::kTilesQ][4];

KF_DEVICE int64_t reduce_offset(const ReduceOperand& operand, const Divider& groups, int row, int feature) {
  const uint32_t m = groups.quotient(static_cast<uint32_t>(row));
  const int64_t g = row - static_cast<int64_t>(m) * groups.divisor;
  return m * operand.stride_m + g * operand.stride_g + feature * operand.stride_f;
}

// Eight neighbours, in copies of `piece`: a smaller one may end at the last feature, or where a token's groups do.
template <class T>
KF_DEVICE void reduce_copy_chunk(unsigned char* target, const ReduceOperand& operand, const Divider& groups, int row,
                                 int end_row, int feature) {
#pragma unroll 1
  for (int i = 0; i < 8; i += operand.piece) {
    const int r = operand.along_rows ? row + i : row, f = operand.along_rows ? feature : feature + i;
    if (f >= operand.features) break;
    const bool valid = r < end_row;
    const T* source = static_cast<const T*>(operand.data);
    if (valid) source += reduce_offset(operand, groups, r, f);
    if (operand.piece == 8) {
      cp_async_16(target, source, valid);
    } else if (operand.piece == 4) {
      cp_async_8(target + 2 * i, source, valid);
    } else {
      cp_async_4(target + 2 * i, source, valid);
    }
  }
}

KF_DEVICE float reduce_scale(const ReduceOperand& operand, const Divider& groups, int row, int feature) {
  const auto g = static_cast<int64_t>(row - groups.quotient(static_cast<uint32_t>(row)) * groups.divisor);
  return load_number(operand.scale, g * operand.scale_stride_g + feature * operand.scale_stride_f, operand.scale_dtype);
}

// Eight neighbours through registers: any strides, fp32 too, and the scale. Rounded once, to T.
template <class T>
KF_DEVICE void reduce_load_chunk(unsigned char* target, const ReduceOperand& operand, const Divider& groups, int row,
                                 int end_row, int feature) {
  float values[8] = {};
  if (operand.by_eight) {
    if (row < end_row) {
      const int64_t offset = reduce_offset(operand, groups, row, feature);
      if (operand.is_float32) {
        const float* source = static_cast<const float*>(operand.data) + offset;
        const Vec16<float> low = load_16<float>(source), high = load_16<float>(source + 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = i < 4 ? low[i % 4] : high[i % 4];
      } else {
        const Vec16<T> loaded = load_16<T>(static_cast<const T*>(operand.data) + offset);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = to_float(loaded[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = operand.along_rows ? row + i : row, f = operand.along_rows ? feature : feature + i;
      if (r >= end_row || f >= operand.features) continue;
      const int64_t offset = reduce_offset(operand, groups, r, f);
      values[i] = operand.is_float32 ? static_cast<const float*>(operand.data)[offset]
                                     : to_float(static_cast<const T*>(operand.data)[offset]);
    }
  }
  if (operand.scale != nullptr) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = operand.along_rows ? row + i : row, f = operand.along_rows ? feature : feature + i;
      if (r < end_row && f < operand.features) values[i] *= reduce_scale(operand, groups, r, f);
    }
  }
  Vec16<T> rounded;
#pragma unroll
  for (int i = 0; i < 8; ++i) rounded[i] = from_float<T>(values[i]);
  store_16(target, rounded);
}

// A tile as lines of rows, [row][feature], or of features, [feature][row]. What lies beyond the features is left as it
// is: it meets only sums that are not stored. Rows beyond the end become zeros in both operands.
template <class T, int Features, int Rows, int Threads>
KF_DEVICE void reduce_fetch(unsigned char* tile, const ReduceOperand& operand, const Divider& groups, int first_row,
                            int end_row, int first_feature) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Features * Rows / 8; i += Threads) {
    int feature, row;
    unsigned char* target;
    if (operand.along_rows) {
      feature = first_feature + i / (Rows / 8);
      row = i % (Rows / 8) * 8;
      target = tile + i / (Rows / 8) * (2 * Rows + 16) + 2 * row;
    } else {
      row = i / (Features / 8);
      feature = i % (Features / 8) * 8;
      target = tile + row * (2 * Features + 16) + 2 * feature;
      feature += first_feature;
    }
    if (feature >= operand.features) continue;
    if (operand.piece != 0) {
      reduce_copy_chunk<T>(target, operand, groups, first_row + row, end_row, feature);
    } else {
      reduce_load_chunk<T>(target, operand, groups, first_row + row, end_row, feature);
    }
  }
}

// Fragments of 16 rows from `row` on. A's are features × rows, so lines of rows are read transposed; B's the other way.
template <class Traits>
KF_DEVICE void reduce_fragment_p(uint32_t (&a)[4], const unsigned char* tile, bool along_rows, int row, int feature) {
  const int i = lane() % 8, low = lane() / 8 & 1, high = lane() / 16;
  if (along_rows) {
    ldmatrix_x4(a, tile + (feature + i + 8 * low) * (2 * Traits::kRows + 16) + 2 * (row + 8 * high));
  } else {
    ldmatrix_x4_trans(a, tile + (row + i + 8 * high) * (2 * Traits::kTileP + 16) + 2 * (feature + 8 * low));
  }
}

template <class Traits>
KF_DEVICE void reduce_fragment_q(uint32_t (&b)[2], const unsigned char* tile, bool along_rows, int row, int feature) {
  const int i = lane() % 8, low = lane() / 8 & 1;
  if (along_rows) {
    ldmatrix_x2(b, tile + (feature + i) * (2 * Traits::kRows + 16) + 2 * (row + 8 * low));
  } else {
    ldmatrix_x2_trans(b, tile + (row + i + 8 * low) * (2 * Traits::kTileQ + 16) + 2 * feature);
  }
}

// Adds a stage's products; tiles wholly outside the gradient, from live_p and live_q on, are passed by.
template <class Traits>
KF_DEVICE void reduce_multiply(ReduceSums<Traits>& sums, const unsigned char* stage, const ReduceParameters& parameters,
                               int warp_p, int warp_q, int first_row, int live_p, int live_q) {
  const unsigned char* q_stage = stage + Traits::kBytesP;
  constexpr int first_tile_p = Traits::kTilesP * 16, first_tile_q = Traits::kTilesQ * 8;
#pragma unroll 1
  for (int row = first_row; row < first_row + Traits::kRowsOfWarp; row += 16) {
    uint32_t b[Traits::kTilesQ][2];
#pragma unroll
    for (int j = 0; j < Traits::kTilesQ; ++j) {
      if (j >= live_q) continue;
      reduce_fragment_q<Traits>(b[j], q_stage, parameters.q.along_rows, row, warp_q * first_tile_q + 8 * j);
    }
#pragma unroll
    for (int i = 0; i < Traits::kTilesP; ++i) {
      if (i >= live_p) continue;
      uint32_t a[4];
      reduce_fragment_p<Traits>(a, stage, parameters.p.along_rows, row, warp_p * first_tile_p + 16 * i);
#pragma unroll
      for (int j = 0; j < Traits::kTilesQ; ++j) {
        if (j < live_q) mma_m16n8k16<typename Traits::T>(sums[i][j], a, b[j]);
      }
    }
  }
}

template <class Traits, class Visit>
KF_DEVICE void reduce_for_each(ReduceSums<Traits>& sums, Visit&& visit) {
#pragma unroll
  for (int i = 0; i < Traits::kTilesP; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kTilesQ; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        visit(16 * i + lane() / 4 + 8 * (k / 2), 8 * j + lane() % 4 * 2 + k % 2, sums[i][j][k]);
      }
    }
  }
}

// Grid (tiles, parts): a block sums its part of the rows for its tile of the gradient.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTileQ > 64 ? 1 : 2)
    reduce_kernel(const ReduceParameters parameters) {
  using T = typename Traits::T;
  constexpr int stages = Traits::kStages;
  unsigned char* ring = dynamic_shared();
  const int tile_p = static_cast<int>(blockIdx.x) / parameters.q_tiles * Traits::kTileP;
  const int tile_q = static_cast<int>(blockIdx.x) % parameters.q_tiles * Traits::kTileQ;
  const int first_row = static_cast<int>(blockIdx.y) * parameters.steps_per_part * Traits::kRows;
  const int left = parameters.rows - first_row;
  const int part = parameters.steps_per_part * Traits::kRows;
  const int end_row = left < part ? parameters.rows : first_row + part;
  const int steps = (end_row - first_row + Traits::kRows - 1) / Traits::kRows;

  const auto fetch = [&](int step) {
    if (step < steps) {
      unsigned char* stage = ring + step % stages * Traits::kStageBytes;
      const int row = first_row + step * Traits::kRows;
      reduce_fetch<T, Traits::kTileP, Traits::kRows, Traits::kThreads>(stage, parameters.p, parameters.groups, row,
                                                                       end_row, tile_p);
      reduce_fetch<T, Traits::kTileQ, Traits::kRows, Traits::kThreads>(stage + Traits::kBytesP, parameters.q,
                                                                       parameters.groups, row, end_row, tile_q);
    }
    cp_async_commit();
  };

  const int warp_r = warp_index() / (Traits::kWarpsP * Traits::kWarpsQ);
  const int warp_p = warp_index() / Traits::kWarpsQ % Traits::kWarpsP;
  const int warp_q = warp_index() % Traits::kWarpsQ;
  const int warp_feature_p = tile_p + warp_p * Traits::kTilesP * 16;
  const int warp_feature_q = tile_q + warp_q * Traits::kTilesQ * 8;
  const int live_p = (parameters.p.features - warp_feature_p + 15) / 16;
  const int live_q = (parameters.q.features - warp_feature_q + 7) / 8;

  ReduceSums<Traits> sums = {};
#pragma unroll 1
  for (int step = 1 - stages; step < steps; ++step) {
    if (step >= 0) {
      cp_async_wait<stages - 2>();
      __syncthreads();
    }
    fetch(step + stages - 1);
    if (step < 0) continue;
    reduce_multiply<Traits>(sums, ring + step % stages * Traits::kStageBytes, parameters, warp_p, warp_q,
                            warp_r * Traits::kRowsOfWarp, live_p, live_q);
  }
  cp_async_wait<0>();

  const int64_t features_p = parameters.p.features, features_q = parameters.q.features;
  float* partial = parameters.partial + blockIdx.y * features_p * features_q;
  if constexpr (Traits::kWarpsR == 1) {
    reduce_for_each<Traits>(sums, [&](int p, int q, float sum) {
      p += warp_feature_p;
      q += warp_feature_q;
      if (p < features_p && q < features_q) partial[p * features_q + q] = sum;
    });
  } else {
    // The warps' sums meet in shared memory and are added in the warps' order.
    constexpr int tile = Traits::kTileP * Traits::kTileQ;
    float* slabs = reinterpret_cast<float*>(ring);
    __syncthreads();
    reduce_for_each<Traits>(
        sums, [&](int p, int q, float sum) { slabs[warp_index() * tile + p * Traits::kTileQ + q] = sum; });
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tile; i += Traits::kThreads) {
      const int p = tile_p + i / Traits::kTileQ, q = tile_q + i % Traits::kTileQ;
      if (p >= features_p || q >= features_q) continue;
      float sum = 0.0f;
      for (int warp = 0; warp < Traits::kWarps; ++warp) sum += slabs[warp * tile + i];
      partial[p * features_q + q] = sum;
    }
  }
}

}  // namespace kronafuse::cuda
