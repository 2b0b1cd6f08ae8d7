// The two inner loops of all products: sums of outer products, and inner products. For kernel files alone, as vector.h.
#pragma once

#include "cpu/common/vector.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {

constexpr int kPair = 2 * kLanes;

// out[r, c] (+)= Σ_k a[k, r] b[k, c] for Rows rows and Vectors · kLanes columns; a is packed, Rows to a k. What was there
// is added last: long sums are sums of short ones, whose rounding errors stay small.
template <int Rows, int Vectors>
KF_INLINE void outer_tile(const float* a, int64_t depth, const float* b, int64_t b_stride, bool accumulate, float* out,
                          int64_t out_stride) {
  Vector sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vector row = broadcast(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += row * columns[v];
    }
    a += Rows;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* to = out + r * out_stride + v * kLanes;
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// All columns of a row panel: pairs of vectors, then one; b and out are padded to whole vectors.
template <int Rows>
KF_INLINE void outer_row(const float* a, int64_t depth, const float* b, int64_t b_stride, int64_t columns, float* out,
                         int64_t out_stride) {
  int64_t c = 0;
  for (; c + kLanes < columns; c += kPair) {
    outer_tile<Rows, 2>(a, depth, b + c, b_stride, false, out + c, out_stride);
  }
  if (c < columns) outer_tile<Rows, 1>(a, depth, b + c, b_stride, false, out + c, out_stride);
}

// out[i, j] += Σ_c p[i, c] q[j, c] for four rows of each; columns are whole vectors.
KF_INLINE void inner_tile(const float* p, int64_t p_stride, const float* q, int64_t q_stride, int64_t columns,
                          float* out, int64_t out_stride) {
  constexpr int size = kLanes == 16 ? 4 : 2;
  for (int i0 = 0; i0 < 4; i0 += size) {
    for (int j0 = 0; j0 < 4; j0 += size) {
      Vector sum[size][size] = {};
      for (int64_t c = 0; c < columns; c += kLanes) {
        Vector right[size];
#pragma GCC unroll 4
        for (int j = 0; j < size; ++j) right[j] = load(q + (j0 + j) * q_stride + c);
#pragma GCC unroll 4
        for (int i = 0; i < size; ++i) {
          const Vector left = load(p + (i0 + i) * p_stride + c);
#pragma GCC unroll 4
          for (int j = 0; j < size; ++j) sum[i][j] += left * right[j];
        }
      }
      for (int i = 0; i < size; ++i) {
        for (int j = 0; j < size; ++j) out[(i0 + i) * out_stride + j0 + j] += sum_of(sum[i][j]);
      }
    }
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
