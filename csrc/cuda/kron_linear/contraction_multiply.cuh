// A warp's products of a tile of x with the factors, and the sum of what several warps have of one set of rows.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/kron_linear/contraction.cuh"

namespace kronafuse::cuda {

template <class Traits>
KF_DEVICE void set_zero(ContractionSums<Traits>& sums) {
#pragma unroll
  for (int i = 0; i < Traits::kSums; ++i) {
    sums[i / (Traits::kColumnTiles * 4)][i / 4 % Traits::kColumnTiles][i % 4] = 0.0f;
  }
}

// sums += a tile of x times the factors' values of k that belong to it.
template <class Traits>
KF_DEVICE void multiply_tile(const ContractionParameters& p, const unsigned char* stage, const unsigned char* factors,
                             int active_pairs, ContractionSums<Traits>& sums) {
  using T = typename Traits::T;
  const int matrix = lane() / 8, line = lane() % 8;
  const int factor_row = line + (matrix / 2) * 8, factor_k = (matrix % 2) * 8;
  for (int k = 0; k < p.plan.tile_k; k += 16) {
    uint32_t a[Traits::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i) {
      const int row = i * 16 + (matrix % 2) * 8, from_k = k + (matrix / 2) * 8;
      if constexpr (Traits::kRowsTogether) {
        ldmatrix_x4_trans(a[i], stage + (from_k + line) * p.plan.x_pitch + row * 2);
      } else {
        ldmatrix_x4(a[i], stage + (row + line) * p.plan.x_pitch + from_k * 2);
      }
    }
#pragma unroll
    for (int pair = 0; pair < Traits::kColumnTiles / 2; ++pair) {
      if (pair >= active_pairs) break;
      uint32_t b[4];
      ldmatrix_x4(b, factors + (pair * 16 + factor_row) * p.plan.factor_pitch + (k + factor_k) * 2);
      const uint32_t even[2] = {b[0], b[1]}, odd[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < Traits::kRowTiles; ++i) {
        mma_m16n8k16<T>(sums[i][2 * pair], a[i], even);
        mma_m16n8k16<T>(sums[i][2 * pair + 1], a[i], odd);
      }
    }
  }
}

// Adds what the warps of one set of rows hold into the first of them, in their order.
template <class Traits>
KF_DEVICE void add_warps(const ContractionPlan& plan, float* shared, int share, ContractionSums<Traits>& sums) {
  const int group = warp_index() / plan.warps_k, threads = plan.warps_k * 32;
  float* own = shared + warp_index() * Traits::kSums * 32 + lane();
  if (share != 0) {
#pragma unroll
    for (int i = 0; i < Traits::kSums; ++i) {
      own[i * 32] = sums[i / (Traits::kColumnTiles * 4)][i / 4 % Traits::kColumnTiles][i % 4];
    }
  }
  named_barrier(1 + group, threads);
  if (share == 0) {
#pragma unroll 1
    for (int other = 1; other < plan.warps_k; ++other) {
#pragma unroll
      for (int i = 0; i < Traits::kSums; ++i) {
        sums[i / (Traits::kColumnTiles * 4)][i / 4 % Traits::kColumnTiles][i % 4] +=
            own[(other * Traits::kSums + i) * 32];
      }
    }
  }
  named_barrier(1 + group, threads);
}

}  // namespace kronafuse::cuda
