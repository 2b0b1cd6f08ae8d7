// Blocks of a strided view as rows of floats. For kernel files alone, as vector.h.
#pragma once

#include "cpu/common/vector.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {

// A row of neighbours: to[c] = from[c] · factor[c]. What is past `count` in `to` is left as it is.
template <class T>
KF_INLINE void gather_row(const T* from, int64_t count, const float* factor, float* to) {
  int64_t c = 0;
  if (factor == nullptr) {
    for (; c + kLanes <= count; c += kLanes) store(to + c, load(from + c));
    if (c < count) store_first(to + c, load_first(from + c, static_cast<int>(count - c)), static_cast<int>(count - c));
    return;
  }
  for (; c + kLanes <= count; c += kLanes) store(to + c, load(from + c) * load(factor + c));
  for (; c < count; ++c) to[c] = to_float(from[c]) * factor[c];
}

// to[r, c] = from[r, c] · factor[r, c], (rows, columns); strides in elements, `factor` may be absent.
template <class T>
static void gather(const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                   const float* factor, int64_t factor_stride, float* to, int64_t to_stride) {
  if (column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      gather_row(from + r * row_stride, columns, factor == nullptr ? nullptr : factor + r * factor_stride,
                 to + r * to_stride);
    }
    return;
  }
  if (row_stride == 1) {
    // Transposed: neighbours in memory are one below the other here.
    for (int64_t c = 0; c < columns; ++c) {
      const T* column = from + c * column_stride;
      for (int64_t r = 0; r < rows; ++r) to[r * to_stride + c] = to_float(column[r]);
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = from + r * row_stride;
      for (int64_t c = 0; c < columns; ++c) to[r * to_stride + c] = to_float(row[c * column_stride]);
    }
  }
  if (factor == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[r * to_stride + c] *= factor[r * factor_stride + c];
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
