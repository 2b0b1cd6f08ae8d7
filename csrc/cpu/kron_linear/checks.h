// Rules that the launchers of this folder share.
#pragma once

#include <optional>

#include "common/view.h"

namespace kronafuse::cpu {

inline bool same_view(const View& a, const View& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.dim != b.dim) return false;
  for (int i = 0; i < a.dim; ++i) {
    if (a.size[i] != b.size[i] || (a.size[i] > 1 && a.stride[i] != b.stride[i])) return false;
  }
  return true;
}

inline void check_dim(const char* op, const char* name, const View& view, int dim) {
  KF_CHECK(view.dim == dim, op, ": ", name, " must have ", dim, " dimensions; got ", Shape{view});
}

inline void check_computes(const char* op, const char* name, const View& view) {
  KF_CHECK(view.dtype == DType::f32 || view.dtype == DType::bf16, op, ": ", name,
           " must be float32 or bfloat16; got ", view.dtype);
}

inline void check_output(const char* op, const char* name, const View& view) {
  KF_CHECK(distinct_elements(view), op, ": elements of ", name, " must not share memory; got shape ", Shape{view},
           ", strides ", Strides{view});
}

// An output whose units run in any order may share no memory with an input, unless each element meets itself alone.
inline void check_apart(const char* op, const char* name, const View& input, const View& output, bool may_be_same) {
  if (may_be_same && same_view(input, output)) return;
  KF_CHECK(!ranges_meet(input, output), op, ": ", name, " must not share memory with the output; got shapes ",
           Shape{input}, " and ", Shape{output}, " at ", input.data, " and ", output.data);
}

inline void check_table(const char* op, const char* name, const std::optional<View>& view, int64_t rows,
                        int64_t columns, const View& output) {
  if (!view) return;
  check_dim(op, name, *view, 2);
  KF_CHECK(view->size[0] == rows && view->size[1] == columns, op, ": ", name, " must be (", rows, ", ", columns,
           "); got ", Shape{*view});
  check_apart(op, name, *view, output, false);
}

}  // namespace kronafuse::cpu
