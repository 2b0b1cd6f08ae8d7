#include "cpu/kron_linear/cast.h"

#include <algorithm>
#include <utility>

#include "cpu/common/element.h"
#include "cpu/common/parallel.h"
#include "cpu/kron_linear/checks.h"

namespace kronafuse::cpu {
namespace {

constexpr int64_t kGrainElements = 1 << 15;

// fp64 keeps its bits where both sides have it; all else fits a float.
void cast_row(const View& source, int64_t from, const View& out, int64_t to) {
  const int64_t step_from = source.stride[1], step_to = out.stride[1];
  if (source.dtype == DType::f64 && out.dtype == DType::f64) {
    const auto* read = static_cast<const double*>(source.data);
    auto* written = static_cast<double*>(out.data);
    for (int64_t c = 0; c < out.size[1]; ++c) written[to + c * step_to] = read[from + c * step_from];
  } else if (source.dtype == DType::f32 && out.dtype == DType::bf16) {
    const auto* read = static_cast<const float*>(source.data);
    auto* written = static_cast<uint16_t*>(out.data);
    for (int64_t c = 0; c < out.size[1]; ++c) written[to + c * step_to] = float_to_bf16(read[from + c * step_from]);
  } else {
    for (int64_t c = 0; c < out.size[1]; ++c) {
      const float value = load_element(source.data, source.dtype, from + c * step_from);
      store_element(out.data, out.dtype, to + c * step_to, value);
    }
  }
}

}  // namespace

void cast(const View& source, const View& out) {
  check_dim("cast", "source", source, 2);
  check_dim("cast", "out", out, 2);
  KF_CHECK(source.size[0] == out.size[0] && source.size[1] == out.size[1], "cast: out must have source's shape ",
           Shape{source}, "; got ", Shape{out});
  check_output("cast", "out", out);
  check_apart("cast", "source", source, out, false);
  if (out.empty()) return;
  View from = source, to = out;
  if (to.stride[0] < to.stride[1]) {
    // Along what lies together.
    for (View* view : {&from, &to}) {
      std::swap(view->size[0], view->size[1]);
      std::swap(view->stride[0], view->stride[1]);
    }
  }
  parallel_for(to.size[0], std::max<int64_t>(1, kGrainElements / to.size[1]), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) cast_row(from, r * from.stride[0], to, r * to.stride[0]);
  });
}

}  // namespace kronafuse::cpu
