// The Hopper form's other warpgroups: products with W, A X beside them, products with B.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/scale.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/kron_linear/fat/hopper_store.cuh"

namespace kronafuse::cuda {

using FatHopperFragments = uint32_t[kFatHopperSteps][4];
using FatHopperMixed = float[kFatHopperSteps][8];

// acc += left · rightᵀ for STEPS times 16 of k; left in registers, which stay as they are until the products are done.
template <class Traits, int STEPS, bool TRANSPOSED>
KF_DEVICE void fat_hopper_multiply_steps(float (&acc)[Traits::kTileN / 2], const FatHopperFragments& left,
                                         uint64_t right, int step_bytes) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    wgmma_m64k16<Traits::kTileN, typename Traits::T, TRANSPOSED>(acc, left[step],
                                                                 wgmma_advance(right, step * step_bytes), true);
  }
  wgmma_commit();
}

template <class Traits, bool TRANSPOSED>
KF_DEVICE void fat_hopper_multiply(float (&acc)[Traits::kTileN / 2], const FatHopperFragments& left, uint64_t right,
                                   int step_bytes, int width) {
  if (width > 48) {
    fat_hopper_multiply_steps<Traits, 4, TRANSPOSED>(acc, left, right, step_bytes);
  } else if (width > 32) {
    fat_hopper_multiply_steps<Traits, 3, TRANSPOSED>(acc, left, right, step_bytes);
  } else if (width > 16) {
    fat_hopper_multiply_steps<Traits, 2, TRANSPOSED>(acc, left, right, step_bytes);
  } else {
    fat_hopper_multiply_steps<Traits, 1, TRANSPOSED>(acc, left, right, step_bytes);
  }
}

KF_DEVICE void fat_hopper_load_fragments(FatHopperFragments& fragments, const unsigned char* x_tile, int first_row) {
  const int row = first_row + lane() % 16;
#pragma unroll
  for (int step = 0; step < kFatHopperSteps; ++step) {
    ldmatrix_x4(fragments[step], x_tile + swizzled(row * 128 + step * 32 + lane() / 16 * 16, Swizzle::b128));
  }
}

template <class T>
KF_DEVICE void fat_hopper_mix(FatHopperMixed& mixed, const FatHopperFragments& fragments, float a) {
#pragma unroll
  for (int step = 0; step < kFatHopperSteps; ++step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Float2 x = unpack2<T>(fragments[step][r]);
      mixed[step][2 * r] += a * x.x;
      mixed[step][2 * r + 1] += a * x.y;
    }
  }
}

// acc = bias.
template <class Traits>
KF_DEVICE void fat_hopper_start(float (&acc)[Traits::kTileN / 2], const FatParameters& p, const FatHopperTile& tile) {
#pragma unroll
  for (int j = 0; j < Traits::kTileN / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int o2 = tile.right_out + j * 8 + lane() % 4 * 2 + e;
      float bias = 0.0f;
      if (p.bias != nullptr && o2 < p.right_out) {
        bias = load_number(p.bias, tile.left_out * p.bias_1 + o2 * p.bias_2, p.bias_dtype);
      }
      acc[4 * j + e] = acc[4 * j + 2 + e] = bias;
    }
  }
}

// A[o1, i1] as T holds it; 0 outside A.
template <class T>
KF_DEVICE float fat_hopper_left(const FatParameters& p, int o1, int i1) {
  if (i1 >= p.left_in) return 0.0f;
  return load_factor(p.a, o1 * p.a_o + i1 * p.a_i, p.a_float32, T{});
}

// After this warp's last read of what the barrier guards.
KF_DEVICE void fat_hopper_release(uint64_t* empty) {
  sync_warp();
  if (lane() == 0) mbarrier_arrive(empty);
}

// A consumer, one warpgroup on 64 rows.
template <class Traits>
KF_DEVICE void fat_hopper_consume(const FatParameters& p, const FatHopperShared<Traits>& shared, int consumer) {
  using T = typename Traits::T;
  const int first_row = consumer * 64 + warp_index() % 4 * 16;
  const float scale = scale_value(p.scale, p.scale_tensor, p.scale_dtype);
  const int64_t count = p.m_blocks * p.n_blocks;
  auto& barriers = shared.barriers();
  FatRing<Traits::kStages> ring;
  FatRing<kFatHopperRightBuffers> right_ring;
  float acc[Traits::kTileN / 2];
  FatHopperFragments fragments, next = {};
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    const FatHopperTile tile(p, index, Traits::kTileN);
    fat_hopper_start<Traits>(acc, p, tile);
    float a_next = fat_hopper_left<T>(p, tile.left_out, 0);
    mbarrier_wait(&barriers.full[ring.index], ring.parity);
    fat_hopper_load_fragments(fragments, shared.x(ring.index), first_row);
#pragma unroll 1
    for (int first_k = 0; first_k < p.right_in; first_k += kFatHopperBlockK) {
      const int width = p.right_in - first_k;
      FatHopperMixed mixed = {};
#pragma unroll 1
      for (int i1 = 0; i1 < p.left_in; ++i1) {
        // No branch may go round these products: the compiler would wait for them one by one.
        const unsigned char* const w_tile = shared.weight(ring.index);
        const uint64_t w = Traits::kTransposed
                               ? wgmma_descriptor_mn_major(w_tile, kFatHopperBlockK, Traits::kSwizzle)
                               : wgmma_descriptor_k_major(w_tile);
        fat_hopper_multiply<Traits, Traits::kTransposed>(acc, fragments, w, Traits::kStepBytes, width);
        const bool last = i1 + 1 == p.left_in;
        const float a = a_next;
        a_next = fat_hopper_left<T>(p, tile.left_out, last ? 0 : i1 + 1);
        fat_hopper_mix<T>(mixed, fragments, a);
        // The next x is taken to registers while the products of this one run.
        uint64_t* const empty = &barriers.empty[ring.index];
        ring.advance();
        if (!last || width > kFatHopperBlockK) {
          mbarrier_wait(&barriers.full[ring.index], ring.parity);
          fat_hopper_load_fragments(next, shared.x(ring.index), first_row);
        }
        wgmma_wait<0>();
        fat_hopper_release(empty);
#pragma unroll
        for (int step = 0; step < kFatHopperSteps; ++step) {
#pragma unroll
          for (int r = 0; r < 4; ++r) fragments[step][r] = next[step][r];
        }
      }
      FatHopperFragments left;
#pragma unroll
      for (int step = 0; step < kFatHopperSteps; ++step) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          // Rounding point 1: A X contains the scale. Beyond I2 it is zero times A, which need not be zero.
          const int k = step * 16 + lane() % 4 * 2 + r / 2 * 8;
          left[step][r] = k < width ? pack2<T>(scale * mixed[step][2 * r], scale * mixed[step][2 * r + 1]) : 0u;
        }
      }
      mbarrier_wait(&barriers.right_full[right_ring.index], right_ring.parity);
      const uint64_t right = wgmma_descriptor_k_major(shared.right(right_ring.index));
      fat_hopper_multiply<Traits, false>(acc, left, right, 32, width);
      wgmma_wait<0>();
      fat_hopper_release(&barriers.right_empty[right_ring.index]);
      right_ring.advance();
    }
    wgmma_fence_operands(acc);
    fat_hopper_store<Traits>(acc, p, tile, tile.first_m + first_row);
  }
}

}  // namespace kronafuse::cuda
