// y = x Wᵀ + bias + base + s · out_scale ⊙ (A ⊗ B)(in_scale ⊙ x): the kernel.
//
// The K loop runs over blocks of i2 and, inside, over i1. Each tile of x feeds the product with W and, times A[o1, i1],
// a sum in registers: after I1 steps that is A X for one block of i2, laid out as an mma wants its left operand, since
// it was added up from x's own fragments. It is scaled, rounded and multiplied by B's block into the accumulator of y.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/scale.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/kron_linear/fat/load.cuh"
#include "cuda/kron_linear/fat/store.cuh"

namespace kronafuse::cuda {

constexpr int kFatRowTiles = kFatWarpM / 16;
constexpr int kFatInnerTiles = kFatBlockK / 16;
static_assert(kFatRowTiles == 2 && kFatInnerTiles == 2);

// One warp's fragments of an x tile, and of A X in fp32: two numbers for each register of the former.
using FatFragments = uint32_t[kFatInnerTiles][kFatRowTiles][4];
using FatMixed = float[kFatInnerTiles][kFatRowTiles][8];

KF_DEVICE void fat_load_fragments(FatFragments& fragments, const unsigned char* x_tile, int first_row) {
  const int row = first_row + lane() % 16, half = lane() / 16;
#pragma unroll
  for (int s = 0; s < kFatInnerTiles; ++s) {
#pragma unroll
    for (int i = 0; i < kFatRowTiles; ++i) {
      ldmatrix_x4(fragments[s][i], x_tile + fat_straight_offset(row + i * 16, s * 2 + half));
    }
  }
}

// The column of x's tile, of the first of the two elements of fragment register r.
KF_DEVICE int fat_fragment_column(int s, int r) { return s * 16 + lane() % 4 * 2 + r / 2 * 8; }

// mixed += A[o1, i1] · x.
template <class T>
KF_DEVICE void fat_mix(FatMixed& mixed, const FatFragments& fragments, float a) {
#pragma unroll
  for (int s = 0; s < kFatInnerTiles; ++s) {
#pragma unroll
    for (int i = 0; i < kFatRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const Float2 x = unpack2<T>(fragments[s][i][r]);
        mixed[s][i][2 * r] += a * x.x;
        mixed[s][i][2 * r + 1] += a * x.y;
      }
    }
  }
}

// mixed += A[o1, i1] · in_scale ⊙ x.
template <class T>
KF_DEVICE void fat_mix_scaled(FatMixed& mixed, const FatFragments& fragments, const FatParameters& p, float a, int i1,
                              int first_k) {
#pragma unroll
  for (int s = 0; s < kFatInnerTiles; ++s) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int k = first_k + fat_fragment_column(s, r);
      const int64_t element = i1 * p.in_1 + k * p.in_2;
      float low = 0.0f, high = 0.0f;
      if (i1 < p.left_in && k < p.right_in) low = a * load_number(p.in_scale, element, p.in_scale_dtype);
      if (i1 < p.left_in && k + 1 < p.right_in) {
        high = a * load_number(p.in_scale, element + p.in_2, p.in_scale_dtype);
      }
#pragma unroll
      for (int i = 0; i < kFatRowTiles; ++i) {
        const Float2 x = unpack2<T>(fragments[s][i][r]);
        mixed[s][i][2 * r] += low * x.x;
        mixed[s][i][2 * r + 1] += high * x.y;
      }
    }
  }
}

// acc += x Wᵀ for the warp's columns, `STEPS` tiles of 16 along k.
template <class T, class Tile, bool TRANSPOSED, int STEPS>
KF_DEVICE void fat_multiply(float (&acc)[kFatRowTiles][Tile::kColumnVectors][4], const FatFragments& fragments,
                            const unsigned char* w_tile, int first_column) {
#pragma unroll
  for (int n = 0; n < Tile::kColumnVectors; ++n) {
    uint32_t w[4];
    if constexpr (TRANSPOSED) {
      ldmatrix_x4_trans(w, w_tile + lane() * Tile::kTransposedPitch + (first_column + n * 8) * 2);
    } else {
      ldmatrix_x4(w, w_tile + fat_straight_offset(first_column + n * 8 + lane() % 8, lane() / 8));
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const uint32_t b[2] = {w[2 * s], w[2 * s + 1]};
#pragma unroll
      for (int i = 0; i < kFatRowTiles; ++i) mma_m16n8k16<T>(acc[i][n], fragments[s][i], b);
    }
  }
}

// acc += round(s · mixed) · Bᵀ for the warp's columns; mixed becomes zero.
template <class T, class Tile>
KF_DEVICE void fat_multiply_right(float (&acc)[kFatRowTiles][Tile::kColumnVectors][4], FatMixed& mixed,
                                  const FatParameters& p, const FatRight<Tile>& right, const float* out_scales,
                                  float scale, int first_k, int first_column) {
  FatFragments left;
#pragma unroll
  for (int s = 0; s < kFatInnerTiles; ++s) {
#pragma unroll
    for (int i = 0; i < kFatRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        // Columns beyond I2 are zero times A, which need not be zero.
        const int k = first_k + fat_fragment_column(s, r);
        const float low = k < p.right_in ? scale * mixed[s][i][2 * r] : 0.0f;
        const float high = k + 1 < p.right_in ? scale * mixed[s][i][2 * r + 1] : 0.0f;
        // Rounding point 1: A X contains the scale.
        left[s][i][r] = pack2<T>(low, high);
        mixed[s][i][2 * r] = mixed[s][i][2 * r + 1] = 0.0f;
      }
    }
  }
  const int local = first_column + lane() / 4;
  const unsigned char* const corner = right.tile + local * right.step_column() + lane() % 4 * 2 * right.step_k();
#pragma unroll
  for (int n = 0; n < Tile::kColumnVectors; ++n) {
    const float out_scale = out_scales[local + n * 8];
#pragma unroll
    for (int s = 0; s < kFatInnerTiles; ++s) {
      const unsigned char* const low = corner + n * 8 * right.step_column() + s * 16 * right.step_k();
      const uint32_t b[2] = {right.template pair<T>(low, out_scale),
                             right.template pair<T>(low + 8 * right.step_k(), out_scale)};
#pragma unroll
      for (int i = 0; i < kFatRowTiles; ++i) mma_m16n8k16<T>(acc[i][n], left[s][i], b);
    }
  }
}

// A[o1, i1] as T holds it; 0 outside A.
template <class T>
KF_DEVICE float fat_left(const FatParameters& p, int o1, int i1) {
  if (o1 >= p.left_out || i1 >= p.left_in) return 0.0f;
  return load_factor(p.a, o1 * p.a_o + i1 * p.a_i, p.a_float32, T{});
}

// The scale of each of the block's columns, 1 where there is none.
template <class Tile>
KF_DEVICE void fat_load_out_scales(float* out_scales, const FatParameters& p, const FatColumns<Tile>& columns) {
  for (int local = threadIdx.x; local < Tile::kBlockN; local += Tile::kThreads) {
    const FatColumn column = columns.at(p, local);
    const int64_t element = column.left * p.out_1 + column.right * p.out_2;
    const bool held = p.out_scale != nullptr && column.valid;
    out_scales[local] = held ? load_number(p.out_scale, element, p.out_scale_dtype) : 1.0f;
  }
}

// acc = bias.
template <class T, class Tile>
KF_DEVICE void fat_start(float (&acc)[kFatRowTiles][Tile::kColumnVectors][4], const FatParameters& p,
                         const FatColumns<Tile>& columns, int first_column) {
#pragma unroll
  for (int n = 0; n < Tile::kColumnVectors; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float bias = 0.0f;
      const FatColumn column = columns.at(p, first_column + n * 8 + lane() % 4 * 2 + e);
      if (p.bias != nullptr && column.valid) {
        bias = load_number(p.bias, column.left * p.bias_1 + column.right * p.bias_2, p.bias_dtype);
      }
#pragma unroll
      for (int i = 0; i < kFatRowTiles; ++i) acc[i][n][e] = acc[i][n][e + 2] = bias;
    }
  }
}

template <class T, class Tile, bool TRANSPOSED>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kThreads > 128 ? 1 : 2) fat_linear_kernel(FatParameters p) {
  // kBand rows of tiles before the next column, so that neighbours share W in cache.
  constexpr int64_t kBand = 8;
  const int64_t band = blockIdx.x / (kBand * p.n_blocks), inside = blockIdx.x % (kBand * p.n_blocks);
  const int64_t left_rows = p.m_blocks - band * kBand, band_rows = left_rows < kBand ? left_rows : kBand;
  const int64_t first_m = (band * kBand + inside % band_rows) * Tile::kBlockM;
  const FatColumns<Tile> columns(p, inside / band_rows);

  unsigned char* const shared = dynamic_shared();
  unsigned char* const right_tiles = shared + Tile::kStages * Tile::kStageBytes(TRANSPOSED);
  const int right_bytes = Tile::kRightBytes(p.b_float32 ? 4 : 2);
  const int right_buffers = Tile::right_buffers(p.left_in);
  float* const out_scales = reinterpret_cast<float*>(right_tiles + right_buffers * right_bytes);
  fat_load_out_scales<Tile>(out_scales, p, columns);
  const FatXLoader<T, Tile> x_loader(p, first_m);
  const FatWeightLoader<T, Tile, TRANSPOSED> w_loader(p, columns);

  // At least two steps a block of i2, so that two tiles of B do; the second is zeros where I1 is 1.
  const int turns = p.left_in < 2 ? 2 : p.left_in;
  int load_i1 = 0, load_k = 0, load_stage = 0, load_right = 0;
  const auto load_next = [&] {
    if (load_k < p.right_in) {
      unsigned char* const stage = shared + load_stage * Tile::kStageBytes(TRANSPOSED);
      x_loader.load(stage, p, load_i1, load_k);
      if (p.weight != nullptr) w_loader.load(stage + Tile::kXBytes, p, load_i1, load_k);
      if (++load_i1 == turns) {
        FatRight<Tile>{right_tiles + load_right * right_bytes, p.b_transposed, p.b_float32}.load(p, columns, load_k);
        load_i1 = 0;
        load_k += kFatBlockK;
        load_right = load_right + 1 == right_buffers ? 0 : load_right + 1;
      }
      load_stage = load_stage + 1 == Tile::kStages ? 0 : load_stage + 1;
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) load_next();

  const int warp_n = warp_index() % kFatWarpsN, warp_m = warp_index() / kFatWarpsN;
  const int first_column = warp_n * Tile::kWarpN;
  const int o1 = warp_n == 0 ? columns.left[0] : columns.left[1];
  const float scale = scale_value(p.scale, p.scale_tensor, p.scale_dtype);
  float acc[kFatRowTiles][Tile::kColumnVectors][4];
  FatMixed mixed = {};
  fat_start<T, Tile>(acc, p, columns, first_column);
  float a_next = fat_left<T>(p, o1, 0);
  int i1 = 0, first_k = 0, stage_index = 0, right_index = 0;
  while (first_k < p.right_in) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    load_next();
    const float a = a_next;
    const bool last = i1 + 1 == turns;
    a_next = fat_left<T>(p, o1, last ? 0 : i1 + 1);
    const unsigned char* const stage = shared + stage_index * Tile::kStageBytes(TRANSPOSED);
    stage_index = stage_index + 1 == Tile::kStages ? 0 : stage_index + 1;
    FatFragments fragments;
    fat_load_fragments(fragments, stage, warp_m * kFatWarpM);
    if (p.weight != nullptr) {
      if (p.right_in - first_k > 16) {
        fat_multiply<T, Tile, TRANSPOSED, 2>(acc, fragments, stage + Tile::kXBytes, first_column);
      } else {
        fat_multiply<T, Tile, TRANSPOSED, 1>(acc, fragments, stage + Tile::kXBytes, first_column);
      }
    }
    if (p.in_scale == nullptr) {
      fat_mix<T>(mixed, fragments, a);
    } else {
      fat_mix_scaled<T>(mixed, fragments, p, a, i1, first_k);
    }
    ++i1;
    if (last) {
      const FatRight<Tile> right{right_tiles + right_index * right_bytes, p.b_transposed, p.b_float32};
      fat_multiply_right<T, Tile>(acc, mixed, p, right, out_scales, scale, first_k, first_column);
      i1 = 0;
      first_k += kFatBlockK;
      right_index = right_index + 1 == right_buffers ? 0 : right_index + 1;
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  fat_store<T, Tile>(shared, acc, p, columns, first_m + warp_m * kFatWarpM, warp_n);
}

}  // namespace kronafuse::cuda
