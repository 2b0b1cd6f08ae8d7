// Products of matrices by the host program's own GEMM, through a hook that the binding sets: launchers stay free of torch.
#pragma once

#include "common/view.h"

namespace kronafuse::cpu {

// out (R, C) = beta · out + alpha · a (R, I) b (I, C), of one dtype; where beta is 0 out is not read.
using Gemm = void (*)(const View& out, const View& a, const View& b, double beta, double alpha);

void set_gemm(Gemm gemm);

// Checks shapes and dtypes, and returns at once where out is empty; an Error until the binding sets the hook.
void gemm(const View& out, const View& a, const View& b, double beta = 0.0, double alpha = 1.0);

// A contiguous matrix.
inline View matrix(void* data, DType dtype, int64_t rows, int64_t columns) {
  return {data, dtype, 2, {rows, columns, 1, 1}, {columns, 1, 0, 0}};
}

inline View transposed(const View& view) {
  return {view.data, view.dtype, 2, {view.size[1], view.size[0], 1, 1}, {view.stride[1], view.stride[0], 0, 0}};
}

// Rows first... of a matrix.
inline View some_rows(const View& view, int64_t first, int64_t count) {
  View rows = view;
  rows.size[0] = count;
  if (view.data != nullptr) {
    rows.data = static_cast<char*>(view.data) + first * view.stride[0] * size_of(view.dtype);
  }
  return rows;
}

// Whether a GEMM reads the matrix where it lies: one dimension's elements together, the other's rows apart.
inline bool is_gemm_ready(const View& view) {
  const auto along = [&](int inner) {
    const int outer = 1 - inner;
    return (view.stride[inner] == 1 || view.size[inner] == 1) &&
           (view.stride[outer] >= view.size[inner] || view.size[outer] == 1);
  };
  return view.empty() || along(0) || along(1);
}

}  // namespace kronafuse::cpu
