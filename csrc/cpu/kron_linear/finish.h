// How sums of products become elements of y. For kernel files alone, as vector.h.
#pragma once

#include "cpu/common/vector.h"
#include "cpu/kron_linear/mix_job.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {

// A part of y: rows from `row` on of one token, columns from `column` on.
struct Place {
  int64_t token, row, column;
};

template <class T>
KF_INLINE T* address(const Operand& operand, const Place& at) {
  return static_cast<T*>(operand.data) + at.token * operand.stride[0] + at.row * operand.stride[1] +
         at.column * operand.stride[2];
}

// What one element of y becomes; sum: of its products, unscaled.
template <class T>
KF_INLINE float finished(const MixJob& job, float sum, int64_t feature, const T* base, const T* y) {
  float value = job.scale * sum;
  if (job.out_scale != nullptr) value *= job.out_scale[feature];
  if (job.bias != nullptr) value += job.bias[feature];
  if (base != nullptr) value += to_float(*base);
  if (job.accumulate) value += to_float(*y);
  return value;
}

// A row of neighbours. The one rounding of y is in `store`.
template <class T>
KF_INLINE void finish_row(const MixJob& job, const Place& at, int64_t columns, const float* sums) {
  T* y = address<T>(job.y, at);
  const T* base = job.base.data == nullptr ? nullptr : address<T>(job.base, at);
  const int64_t feature = at.row * job.columns + at.column;
  const float* gain = job.out_scale == nullptr ? nullptr : job.out_scale + feature;
  const float* bias = job.bias == nullptr ? nullptr : job.bias + feature;
  const Vector scale = broadcast(job.scale);
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    Vector value = scale * load(sums + c);
    if (gain != nullptr) value *= load(gain + c);
    if (bias != nullptr) value += load(bias + c);
    if (base != nullptr) value += load(base + c);
    if (job.accumulate) value += load(y + c);
    store(y + c, value);
  }
  if (c == columns) return;
  const int rest = static_cast<int>(columns - c);
  Vector value = scale * load_first(sums + c, rest);
  if (gain != nullptr) value *= load_first(gain + c, rest);
  if (bias != nullptr) value += load_first(bias + c, rest);
  if (base != nullptr) value += load_first(base + c, rest);
  if (job.accumulate) value += load_first(y + c, rest);
  store_first(y + c, value, rest);
}

// `rows` rows of one token, in the order in which y lies in memory; sums (rows, columns).
template <class T>
static void finish(const MixJob& job, const Place& at, int64_t rows, int64_t columns, const float* sums, int64_t stride) {
  const bool base_is_plain = job.base.data == nullptr || job.base.stride[2] == 1;
  if (job.y.stride[2] == 1 && base_is_plain) {
    for (int64_t r = 0; r < rows; ++r) {
      finish_row<T>(job, {at.token, at.row + r, at.column}, columns, sums + r * stride);
    }
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      const Place here{at.token, at.row + r, at.column + c};
      T* y = address<T>(job.y, here);
      const T* base = job.base.data == nullptr ? nullptr : address<T>(job.base, here);
      put(y, finished(job, sums[r * stride + c], here.row * job.columns + here.column, base, y));
    }
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
