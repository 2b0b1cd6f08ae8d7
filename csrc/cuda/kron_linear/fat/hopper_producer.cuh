// The Hopper form's first warpgroup: one thread fetches tiles of x and W by TMA, three warps round tiles of B.
#pragma once

#include "cuda/common/scale.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/kron_linear/fat/hopper_shared.cuh"

namespace kronafuse::cuda {

// Every tile of the block, every block of i2: body(tile, first_k).
template <class Traits, class Body>
KF_DEVICE void fat_hopper_walk(const FatParameters& p, Body&& body) {
  const int64_t count = p.m_blocks * p.n_blocks;
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    const FatHopperTile tile(p, index, Traits::kTileN);
    for (int first_k = 0; first_k < p.right_in; first_k += kFatHopperBlockK) body(tile, first_k);
  }
}

// The producer, one thread.
template <class Traits>
KF_DEVICE void fat_hopper_fetch(const FatHopperProblem& problem, const FatHopperShared<Traits>& shared) {
  const FatParameters& p = problem.p;
  tma_prefetch(problem.x);
  tma_prefetch(problem.weight);
  FatRing<Traits::kStages> ring;
  fat_hopper_walk<Traits>(p, [&](const FatHopperTile& tile, int first_k) {
    const int n = tile.left_out * p.right_out + tile.right_out;
    for (int i1 = 0; i1 < p.left_in; ++i1, ring.advance()) {
      uint64_t* const full = &shared.barriers().full[ring.index];
      mbarrier_wait(&shared.barriers().empty[ring.index], ring.parity ^ 1u);
      mbarrier_arrive_expect(full, Traits::kStageBytes);
      tma_load_3d(shared.x(ring.index), problem.x, first_k, i1, tile.first_m, full);
      if constexpr (Traits::kTransposed) {
#pragma unroll
        for (int box = 0; box < Traits::kTileN / Traits::kBoxColumns; ++box) {
          tma_load_3d(shared.weight(ring.index) + box * Traits::kBoxBytes, problem.weight,
                      n + box * Traits::kBoxColumns, first_k, i1, full);
        }
      } else {
        tma_load_3d(shared.weight(ring.index), problem.weight, first_k, i1, n, full);
      }
    }
  });
}

// 8 elements of B along i2 from (o2, i2) on, times the row's scale; zeros outside B.
template <class T>
KF_DEVICE void fat_hopper_load_right(float (&values)[8], const FatParameters& p, int o1, int o2, int i2) {
  const int valid = o2 < p.right_out ? p.right_in - i2 : 0;  // right_in is a multiple of 8
  const int64_t first = o2 * p.b_o + i2 * p.b_i;
  if (valid <= 0) {
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] = 0.0f;
  } else if (p.b_float32) {
    const float* const source = static_cast<const float*>(p.b) + first;
    if (p.b_vectors && !p.b_transposed) {
      const Vec16<float> low = load_16<float>(source), high = load_16<float>(source + 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        values[e] = low[e];
        values[e + 4] = high[e];
      }
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = source[e * p.b_i];
    }
  } else {
    const T* const source = static_cast<const T*>(p.b) + first;
    if (p.b_vectors && !p.b_transposed) {
      const Vec16<T> vector = load_16<T>(source);
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = to_float(vector[e]);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = to_float(source[e * p.b_i]);
    }
  }
  if (p.out_scale != nullptr && valid > 0) {
    const float scale = load_number(p.out_scale, o1 * p.out_1 + o2 * p.out_2, p.out_scale_dtype);
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] *= scale;
  }
}

// The loaders of B, kFatHopperLoaders threads: tiles [kTileN][64] of T, rows of one swizzle, whatever B is in memory.
template <class Traits>
KF_DEVICE void fat_hopper_load_rights(const FatParameters& p, const FatHopperShared<Traits>& shared, int thread) {
  using T = typename Traits::T;
  constexpr int kVectors = kFatHopperBlockK / 8, kTotal = Traits::kTileN * kVectors, kAhead = 4;
  FatRing<kFatHopperRightBuffers> ring;
  fat_hopper_walk<Traits>(p, [&](const FatHopperTile& tile, int first_k) {
    mbarrier_wait(&shared.barriers().right_empty[ring.index], ring.parity ^ 1u);
    unsigned char* const target = shared.right(ring.index);
    for (int first = thread; first < kTotal; first += kAhead * kFatHopperLoaders) {
      float values[kAhead][8];
      int rows[kAhead], vectors[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int item = first + j * kFatHopperLoaders;
        // Neighbours read along B's dense side.
        rows[j] = p.b_transposed ? item % Traits::kTileN : item / kVectors;
        vectors[j] = p.b_transposed ? item / Traits::kTileN : item % kVectors;
        if (item >= kTotal) continue;
        fat_hopper_load_right<T>(values[j], p, tile.left_out, tile.right_out + rows[j], first_k + vectors[j] * 8);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j * kFatHopperLoaders >= kTotal) continue;
        Vec16<T> rounded;
        // Rounding point: a row scale enters B before it is rounded.
#pragma unroll
        for (int e = 0; e < 8; ++e) rounded[e] = from_float<T>(values[j][e]);
        store_16(target + swizzled(rows[j] * 128 + vectors[j] * 16, Swizzle::b128), rounded);
      }
    }
    fence_async_shared();
    mbarrier_arrive(&shared.barriers().right_full[ring.index]);
    ring.advance();
  });
}

}  // namespace kronafuse::cuda
