// Products of a stage's tiles, by ldmatrix and mma.m16n8k16.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/kron_linear/plain/work.cuh"

namespace kronafuse::cuda::plain {

// Where a warp's fragments lie in a stage.
template <class Traits>
struct Consumer {
  using T = typename Traits::T;
  int lane, first_row, first_column;  // of the warp in the tile

  KF_DEVICE Consumer(int lane_of_warp, int warp)
      : lane(lane_of_warp),
        first_row(warp / Traits::kWarpsN * Traits::kWarpM),
        first_column(warp % Traits::kWarpsN * Traits::kWarpN) {}

  KF_DEVICE void multiply(const unsigned char* stage, Accumulators<Traits>& acc) const {
#pragma unroll
    for (int k = 0; k < Traits::kTileK / 16; ++k) {
      uint32_t a[Traits::kFragmentsM][4], b[Traits::kFragmentsN / 2][4];
      read_a(stage, k, a);
      read_b(stage + Traits::kABytes, k, b);
#pragma unroll
      for (int i = 0; i < Traits::kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < Traits::kFragmentsN; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16<T>(acc[i][j], a[i], pair);
        }
      }
    }
  }

 private:
  KF_DEVICE void read_a(const unsigned char* tile, int k, uint32_t (&a)[Traits::kFragmentsM][4]) const {
    const unsigned char* row = tile + (first_row + lane % 16) * Traits::kTileK * 2;
    const int chunk = Traits::swizzle_k(lane % 16, k * 2 + lane / 16);
#pragma unroll
    for (int i = 0; i < Traits::kFragmentsM; ++i) ldmatrix_x4(a[i], row + i * 16 * Traits::kTileK * 2 + chunk * 16);
  }

  // Registers 0 and 1 are the first eight columns' fragment, 2 and 3 the next eight's.
  KF_DEVICE void read_b(const unsigned char* tile, int k, uint32_t (&b)[Traits::kFragmentsN / 2][4]) const {
#pragma unroll
    for (int j = 0; j < Traits::kFragmentsN / 2; ++j) {
      if constexpr (Traits::kTransposedB) {
        ldmatrix_x4_trans(b[j], tile + Traits::offset_n(k * 16 + lane % 16, first_column / 8 + j * 2 + lane / 16));
      } else {
        const unsigned char* row = tile + (first_column + lane / 16 * 8 + lane % 8) * Traits::kTileK * 2;
        const int chunk = Traits::swizzle_k(lane % 8, k * 2 + lane / 8 % 2);
        ldmatrix_x4(b[j], row + j * 16 * Traits::kTileK * 2 + chunk * 16);
      }
    }
  }
};

}  // namespace kronafuse::cuda::plain
