// The fat kernel's way out: accumulators through shared memory, so that 16 bytes of a row are read and written at once.
#pragma once

#include "cuda/common/vector.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/kron_linear/fat/parameters.cuh"

namespace kronafuse::cuda {

// Floats from one staged row to the next: 8 beyond a multiple of 16, so that pairs of 4 rows are in different banks.
template <class Tile>
constexpr int kFatStagePitch = Tile::kWarpN + (24 - Tile::kWarpN % 16) % 16;

// y = round(acc + base) for a warp's rows and columns. Each warp stages 16 rows at a time in memory of its own.
template <class T, class Tile>
KF_DEVICE void fat_store(unsigned char* shared, const float (&acc)[kFatWarpM / 16][Tile::kColumnVectors][4],
                         const FatParameters& p, const FatColumns<Tile>& columns, int64_t first_row, int warp_n) {
  constexpr int kPitch = kFatStagePitch<Tile>;
  static_assert(Tile::kThreads / 32 * 16 * kPitch * 4 <= Tile::kStages * Tile::kStageBytes(false));
  float* const staged = reinterpret_cast<float*>(shared) + warp_index() * 16 * kPitch;
  T* const y = static_cast<T*>(p.y);
  const T* const base = static_cast<const T*>(p.base);
#pragma unroll
  for (int i = 0; i < kFatWarpM / 16; ++i) {
    sync_warp();
#pragma unroll
    for (int n = 0; n < Tile::kColumnVectors; ++n) {
      float* const target = staged + lane() / 4 * kPitch + n * 8 + lane() % 4 * 2;
      *reinterpret_cast<Float2*>(target) = {acc[i][n][0], acc[i][n][1]};
      *reinterpret_cast<Float2*>(target + 8 * kPitch) = {acc[i][n][2], acc[i][n][3]};
    }
    sync_warp();
    for (int item = lane(); item < 16 * Tile::kColumnVectors; item += 32) {
      const int row = item / Tile::kColumnVectors, vector = item % Tile::kColumnVectors;
      const int64_t m = first_row + i * 16 + row;
      const FatColumn column = columns.at(p, warp_n * Tile::kWarpN + vector * 8);
      if (m >= p.tokens || !column.valid) continue;
      const int count = p.right_out - column.right < 8 ? p.right_out - column.right : 8;
      float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = staged[row * kPitch + vector * 8 + e];
      if (base != nullptr) {
        const T* const source = base + m * p.base_m + column.left * p.base_1 + column.right * p.base_2;
        if (p.base_vectors) {
          const Vec16<T> added = load_16<T>(source);
#pragma unroll
          for (int e = 0; e < 8; ++e) values[e] += to_float(added[e]);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (e < count) values[e] += to_float(source[e * p.base_2]);
          }
        }
      }
      // Rounding point 2: x Wᵀ, delta, bias and base together, once.
      T* const target = y + m * p.y_m + column.left * p.y_1 + column.right * p.y_2;
      if (p.y_vectors) {
        Vec16<T> result;
#pragma unroll
        for (int e = 0; e < 8; ++e) result[e] = from_float<T>(values[e]);
        store_16(target, result);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (e < count) target[e * p.y_2] = from_float<T>(values[e]);
        }
      }
    }
  }
}

}  // namespace kronafuse::cuda
