// Small operands as dense floats, from any strides and dtype: factors, scales and biases, read once per call.
#pragma once

#include <optional>

#include "cpu/common/buffer.h"
#include "cpu/common/element.h"
#include "cpu/common/operand.h"

namespace kronafuse::cpu {

inline Operand operand_of(const View& view) {
  return {view.data, {view.stride[0], view.stride[1], view.stride[2]}};
}

inline Operand operand_of(const std::optional<View>& view) {
  return view ? operand_of(*view) : Operand{nullptr, {0, 0, 0}};
}

// (rows, columns) as rows of floats, rounded to the compute dtype; nothing where the view is absent.
inline std::optional<Floats> dense(const std::optional<View>& view, DType compute) {
  if (!view) return std::nullopt;
  const int64_t rows = view->size[0], columns = view->size[1];
  std::optional<Floats> out(std::in_place, rows * columns);
  float* to = out->data();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t at = r * view->stride[0] + c * view->stride[1];
      *to++ = rounded_to(compute, load_element(view->data, view->dtype, at));
    }
  }
  return out;
}

inline const float* data_of(const std::optional<Floats>& floats) { return floats ? floats->data() : nullptr; }

}  // namespace kronafuse::cpu
