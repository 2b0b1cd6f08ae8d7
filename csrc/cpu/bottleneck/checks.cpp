#include "cpu/bottleneck/checks.h"

#include "common/check.h"

namespace kronafuse::cpu::bottleneck {

void check_factors(const char* op, const View& down, const View& up, const View* scale, int64_t activation,
                   DType compute) {
  KF_CHECK(compute == DType::f32 || compute == DType::bf16, op, ": pre must be float32 or bfloat16; got ", compute);
  KF_CHECK(down.dim == 2 && up.dim == 2 && !down.empty() && !up.empty(), op,
           ": down must be (H, K) and up (N, H) with sizes of at least 1; got ", Shape{down}, ", ", Shape{up});
  KF_CHECK(up.size[1] == down.size[0], op, ": down (H, K) and up (N, H) must share H; got down ", Shape{down}, ", up ",
           Shape{up});
  KF_CHECK(activation >= 0 && activation < kActivations, op, ": activation must be from 0 to ", kActivations - 1,
           "; got ", activation);
  KF_CHECK(scale == nullptr || scale->elements() == 1, op, ": a tensor scale must have one element; got ",
           Shape{*scale});
}

void check_shape(const char* op, const char* name, const View& view, int64_t rows, int64_t columns) {
  if (columns < 0) {
    KF_CHECK(view.dim == 1 && view.size[0] == rows, op, ": ", name, " must be (", rows, "); got ", Shape{view});
  } else {
    KF_CHECK(view.dim == 2 && view.size[0] == rows && view.size[1] == columns, op, ": ", name, " must be (", rows, ", ",
             columns, "); got ", Shape{view});
  }
}

void check_contiguous(const char* op, const char* name, const View& view, int64_t rows, int64_t columns) {
  check_shape(op, name, view, rows, columns);
  const bool contiguous = (view.stride[1] == 1 || columns <= 1) && (view.stride[0] == columns || rows <= 1);
  KF_CHECK(contiguous || view.empty(), op, ": ", name, " must be contiguous; got strides ", Strides{view});
}

void check_apart(const char* op, const char* name, const View& output, const char* other, const View& input) {
  KF_CHECK(!ranges_meet(output, input), op, ": ", name, " must not share memory with ", other, "; got shapes ",
           Shape{output}, " and ", Shape{input});
}

}  // namespace kronafuse::cpu::bottleneck
