// Copies of the fat kernel's tiles from global to shared memory: by 16 bytes as they come, or element by element where
// strides, sizes or alignment do not allow that.
#pragma once

#include "cuda/common/async.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/kron_linear/fat_linear_configs.h"
#include "cuda/kron_linear/fat/parameters.cuh"

namespace kronafuse::cuda {

// Where 16 bytes of shared memory come from, but for the step: `first` is their first element at i1 = 0, i2 = 0, null
// where all of them lie outside the tensor.
template <class T>
struct FatLine {
  const T* first;
  int shared;  // bytes into the tile
};

// Where a tile stored [row][k] has these 8 elements of k, in bytes.
KF_DEVICE int fat_straight_offset(int row, int vector) {
  return row * (kFatBlockK * 2) + ((vector ^ ((row >> 1) & 3)) << 4);
}

// 8 elements along k of one row of x, or of W where it is stored [n][k].
template <class T>
KF_DEVICE void fat_load_along_k(unsigned char* tile, const FatLine<T>& line, const T* step, int valid, bool vectors,
                                int64_t stride) {
  if (vectors) {
    cp_async_16(tile + line.shared, step, line.first != nullptr && valid > 0);
    return;
  }
  Vec16<T> values;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    values[e] = line.first != nullptr && e < valid ? step[e * stride] : T{0};
  }
  store_16(tile + line.shared, values);
}

// The x tile [BLOCK_M][kFatBlockK] of one step.
template <class T, class Tile>
struct FatXLoader {
  static constexpr int kLines = Tile::kBlockM * 4 / Tile::kThreads;
  static_assert(Tile::kBlockM * 4 % Tile::kThreads == 0);
  FatLine<T> lines[kLines];
  int vector;

  KF_DEVICE FatXLoader(const FatParameters& p, int64_t first_row) : vector(threadIdx.x % 4) {
#pragma unroll
    for (int j = 0; j < kLines; ++j) {
      const int row = threadIdx.x / 4 + j * (Tile::kThreads / 4);
      const int64_t m = first_row + row;
      const T* first = static_cast<const T*>(p.x) + m * p.x_m + vector * 8 * p.x_2;
      lines[j] = {m < p.tokens ? first : nullptr, fat_straight_offset(row, vector)};
    }
  }

  KF_DEVICE void load(unsigned char* tile, const FatParameters& p, int i1, int first_k) const {
    const int64_t step = i1 * p.x_1 + first_k * p.x_2;
    const int valid = i1 < p.left_in ? p.right_in - first_k - vector * 8 : 0;
#pragma unroll
    for (int j = 0; j < kLines; ++j) {
      fat_load_along_k(tile, lines[j], lines[j].first + step, valid, p.x_vectors, p.x_2);
    }
  }
};

// The W tile of one step: [kBlockN][kFatBlockK], or [kFatBlockK][kBlockN] where W's features lie side by side.
template <class T, class Tile, bool TRANSPOSED>
struct FatWeightLoader {
  static constexpr int kRowVectors = TRANSPOSED ? Tile::kBlockN / 8 : 4;
  static constexpr int kVectors = TRANSPOSED ? kFatBlockK * kRowVectors : Tile::kBlockN * 4;
  static constexpr int kLines = (kVectors + Tile::kThreads - 1) / Tile::kThreads;
  FatLine<T> lines[kLines];

  KF_DEVICE static bool exists(int j) {
    return kVectors % Tile::kThreads == 0 || static_cast<int>(threadIdx.x) + j * Tile::kThreads < kVectors;
  }
  KF_DEVICE static int row(int j) { return (threadIdx.x + j * Tile::kThreads) / kRowVectors; }
  KF_DEVICE static int vector(int j) { return (threadIdx.x + j * Tile::kThreads) % kRowVectors; }

  KF_DEVICE FatWeightLoader(const FatParameters& p, const FatColumns<Tile>& columns) {
    const T* weight = static_cast<const T*>(p.weight);
#pragma unroll
    for (int j = 0; j < kLines; ++j) {
      const FatColumn column = columns.at(p, TRANSPOSED ? vector(j) * 8 : row(j));
      const T* first = weight + column.left * p.w_1 + column.right * p.w_2;
      first += (TRANSPOSED ? row(j) : vector(j) * 8) * p.w_k2;
      const int offset = TRANSPOSED ? row(j) * Tile::kTransposedPitch + vector(j) * 16
                                    : fat_straight_offset(row(j), vector(j));
      lines[j] = {weight != nullptr && column.valid && exists(j) ? first : nullptr, offset};
    }
  }

  KF_DEVICE void load(unsigned char* tile, const FatParameters& p, int i1, int first_k) const {
    const int64_t step = i1 * p.w_k1 + first_k * p.w_k2;
    const int left = i1 < p.left_in ? p.right_in - first_k : 0;
#pragma unroll
    for (int j = 0; j < kLines; ++j) {
      if (!exists(j)) continue;
      const T* source = lines[j].first + step;
      if constexpr (TRANSPOSED) {
        cp_async_16(tile + lines[j].shared, source, lines[j].first != nullptr && row(j) < left);
      } else {
        fat_load_along_k(tile, lines[j], source, left - vector(j) * 8, p.w_vectors, p.w_k2);
      }
    }
  }
};

// How B's tile lies in shared memory: in B's own dtype and orientation, so that copies need no registers. It is read
// once in I1 steps, and rounded then.
template <class Tile>
struct FatRight {
  unsigned char* tile;
  bool transposed, is_float32;

  KF_DEVICE int bytes() const { return is_float32 ? 4 : 2; }
  // Bytes from an element to the next along k, and to the next column's.
  KF_DEVICE int step_k() const { return transposed ? Tile::kRightPitchTransposed(bytes()) * bytes() : bytes(); }
  KF_DEVICE int step_column() const { return transposed ? bytes() : Tile::kRightPitch * bytes(); }

  // Elements outside B become zeros.
  KF_DEVICE void load(const FatParameters& p, const FatColumns<Tile>& columns, int first_k) const {
    const int along = p.b_vectors ? 16 / bytes() : 1;
    const int inner = (transposed ? Tile::kBlockN : kFatBlockK) / along;
    const int count = Tile::kBlockN * kFatBlockK / along;
    for (int i = threadIdx.x; i < count; i += Tile::kThreads) {
      const int outer = i / inner, first = i % inner * along;
      const int local = transposed ? first : outer, k = transposed ? outer : first;
      const FatColumn column = columns.at(p, local);
      const bool valid = column.valid && first_k + k < p.right_in;
      const int64_t element = column.right * p.b_o + (first_k + k) * p.b_i;
      const unsigned char* source = static_cast<const unsigned char*>(p.b) + element * bytes();
      unsigned char* target = tile + local * step_column() + k * step_k();
      if (p.b_vectors) {
        cp_async_16(target, source, valid);
      } else if (is_float32) {
        *reinterpret_cast<float*>(target) = valid ? *reinterpret_cast<const float*>(source) : 0.0f;
      } else {
        *reinterpret_cast<uint16_t*>(target) = valid ? *reinterpret_cast<const uint16_t*>(source) : uint16_t{0};
      }
    }
  }

  // B[column][k], B[column][k + 1] as one register of an mma's operand; `low` is where the former lies.
  template <class T>
  KF_DEVICE uint32_t pair(const unsigned char* low, float out_scale) const {
    const unsigned char* high = low + step_k();
    Float2 values;
    if (is_float32) {
      values = {*reinterpret_cast<const float*>(low), *reinterpret_cast<const float*>(high)};
    } else {
      values = {to_float(*reinterpret_cast<const T*>(low)), to_float(*reinterpret_cast<const T*>(high))};
    }
    // Rounding point: a row scale enters B before it is rounded.
    return pack2<T>(values.x * out_scale, values.y * out_scale);
  }
};

}  // namespace kronafuse::cuda
