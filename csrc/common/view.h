// A strided view of a tensor's elements, free of torch: what the binding of each library hands to its launchers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <ostream>

#include "common/check.h"

namespace kronafuse {

enum class DType : int { f64, f32, bf16, f16 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

constexpr const char* name_of(DType dtype) {
  return dtype == DType::f64    ? "float64"
         : dtype == DType::f32  ? "float32"
         : dtype == DType::bf16 ? "bfloat16"
                                : "float16";
}

inline std::ostream& operator<<(std::ostream& stream, DType dtype) { return stream << name_of(dtype); }

// Strides count elements. They may be any non-negative value, 0 for an expanded dimension.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int dim = 0;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};

  int64_t elements() const {
    int64_t count = 1;
    for (int i = 0; i < dim; ++i) count *= size[i];
    return count;
  }
  bool empty() const { return elements() == 0; }

  // The distance in elements from the first element to one past the last one; 0 when there is none.
  int64_t extent() const {
    if (empty()) return 0;
    int64_t last = 0;
    for (int i = 0; i < dim; ++i) last += (size[i] - 1) * stride[i];
    return last + 1;
  }
};

// "(2048, 1280)": for messages.
struct Shape {
  const View& view;
};

inline std::ostream& operator<<(std::ostream& stream, Shape shape) {
  stream << '(';
  for (int i = 0; i < shape.view.dim; ++i) stream << (i ? ", " : "") << shape.view.size[i];
  return stream << ')';
}

struct Strides {
  const View& view;
};

inline std::ostream& operator<<(std::ostream& stream, Strides strides) {
  stream << '(';
  for (int i = 0; i < strides.view.dim; ++i) stream << (i ? ", " : "") << strides.view.stride[i];
  return stream << ')';
}

// Whether no two indices of the view name the same element; exact for the views torch makes (nested strides), and never
// true for an overlapping one: with the dimensions sorted by stride each must step over all that the smaller ones reach.
inline bool distinct_elements(const View& view) {
  if (view.empty()) return true;
  bool used[4] = {false, false, false, false};
  int64_t reach = 1;
  for (int round = 0; round < view.dim; ++round) {
    int smallest = -1;
    for (int i = 0; i < view.dim; ++i) {
      if (used[i]) continue;
      if (view.size[i] == 1) {
        used[i] = true;
        continue;
      }
      if (smallest < 0 || view.stride[i] < view.stride[smallest]) smallest = i;
    }
    if (smallest < 0) break;
    used[smallest] = true;
    if (view.stride[smallest] < reach) return false;
    reach += (view.size[smallest] - 1) * view.stride[smallest];
  }
  return true;
}

// Whether two views may share memory: their byte ranges meet. May be true of views that interleave without meeting.
inline bool ranges_meet(const View& a, const View& b) {
  if (a.empty() || b.empty()) return false;
  const auto first = [](const View& v) { return reinterpret_cast<uintptr_t>(v.data); };
  const auto last = [&](const View& v) { return first(v) + static_cast<uintptr_t>(v.extent() * size_of(v.dtype)); };
  return first(a) < last(b) && first(b) < last(a);
}

}  // namespace kronafuse
