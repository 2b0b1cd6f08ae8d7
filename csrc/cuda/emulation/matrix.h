// Small dense products in float, row-major.
#pragma once

#include "common/view.h"
#include "cuda/common/half_bits.h"

namespace kronafuse::cuda::emulation {

inline float widen(uint16_t bits, DType dtype) {
  return dtype == DType::bf16 ? bf16_bits_to_float(bits) : f16_bits_to_float(bits);
}

typedef float Float8 __attribute__((vector_size(32), aligned(4)));

// c (rows, columns) += a (rows, depth) · b (depth, columns); columns a multiple of 8.
inline void multiply_add(float* c, const float* a, const float* b, int rows, int columns, int depth) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; column += 8) {
      Float8 sum = *reinterpret_cast<Float8*>(c + row * columns + column);
      for (int k = 0; k < depth; ++k) {
        sum += a[row * depth + k] * *reinterpret_cast<const Float8*>(b + k * columns + column);
      }
      *reinterpret_cast<Float8*>(c + row * columns + column) = sum;
    }
  }
}

}  // namespace kronafuse::cuda::emulation
