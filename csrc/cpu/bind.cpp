// torch.ops.kronafuse_cpu: tensors as views, through LibTorch's stable ABI. The one file here that knows torch.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "common/check.h"
#include "common/view.h"
#include "cpu/bottleneck/bottleneck.h"
#include "cpu/common/gemm.h"
#include "cpu/common/level.h"
#include "cpu/common/parallel.h"
#include "cpu/kron_linear/cast.h"
#include "cpu/kron_linear/columns.h"
#include "cpu/kron_linear/mix.h"
#include "cpu/kron_linear/reduce.h"
#include "cpu/kron_merge/merge.h"

namespace kronafuse::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      KF_CHECK(false, op, ": ", name, " must be float64, float32, bfloat16 or float16; got torch.ScalarType ",
               static_cast<int>(tensor.scalar_type()));
  }
}

// Expanded views alone have more, as memory has 2^47 bytes: up to here products of sizes are far from an overflow.
constexpr int64_t kMostElements = int64_t{1} << 48;

View view_of(const Tensor& tensor, const char* op, const char* name) {
  KF_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU; got device type ",
           static_cast<int>(tensor.device().type()));
  const int64_t dim = tensor.dim();
  KF_CHECK(dim <= 4, op, ": ", name, " must have at most 4 dimensions; got ", dim);
  View view;
  view.dtype = dtype_of(tensor, op, name);
  view.dim = static_cast<int>(dim);
  int64_t elements = 1;
  for (int i = 0; i < view.dim; ++i) {
    view.size[i] = tensor.size(i);
    view.stride[i] = tensor.stride(i);
    KF_CHECK(!__builtin_mul_overflow(elements, view.size[i], &elements) && elements <= kMostElements, op, ": ", name,
             " must have at most 2^48 elements; dimension ", i, " of ", dim, " has ", view.size[i]);
  }
  view.data = elements == 0 ? nullptr : tensor.data_ptr();
  KF_CHECK(elements == 0 || view.data != nullptr, op, ": ", name, " of ", elements, " elements has no memory");
  return view;
}

std::optional<View> view_of(const std::optional<Tensor>& tensor, const char* op, const char* name) {
  if (!tensor) return std::nullopt;
  return view_of(*tensor, op, name);
}

void mix_op(const std::optional<Tensor>& p, const std::optional<Tensor>& left, const std::optional<Tensor>& in_scale,
            const std::optional<Tensor>& out_scale, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& base, double scale, bool accumulate, const Tensor& y) {
  mix(view_of(p, "mix", "p"), view_of(left, "mix", "left"), view_of(in_scale, "mix", "in_scale"),
      view_of(out_scale, "mix", "out_scale"), view_of(bias, "mix", "bias"), view_of(base, "mix", "base"), scale,
      accumulate, view_of(y, "mix", "y"));
}

void reduce_op(const Tensor& p, const Tensor& q, const std::optional<Tensor>& p_scale, double scale, bool accumulate,
               const Tensor& out) {
  reduce(view_of(p, "reduce", "p"), view_of(q, "reduce", "q"), view_of(p_scale, "reduce", "p_scale"), scale,
         accumulate, view_of(out, "reduce", "out"));
}

void column_sums_op(const Tensor& p, const std::optional<Tensor>& q, bool accumulate, const Tensor& out) {
  column_sums(view_of(p, "column_sums", "p"), view_of(q, "column_sums", "q"), accumulate,
              view_of(out, "column_sums", "out"));
}

void cast_op(const Tensor& source, const Tensor& out) {
  cast(view_of(source, "cast", "source"), view_of(out, "cast", "out"));
}

void merge_op(const Tensor& weight, const Tensor& left, const Tensor& right, double scale, bool shuffled,
              const Tensor& out) {
  merge(view_of(weight, "merge", "weight"), view_of(left, "merge", "left"), view_of(right, "merge", "right"), scale,
        shuffled, view_of(out, "merge", "out"));
}

// bottleneck

// A tensor over memory that someone else owns and keeps.
Tensor tensor_over(const View& view) {
  const int32_t dtype = view.dtype == DType::bf16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(view.data, view.dim, view.size, view.stride, 0, dtype,
                                                            aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void gemm_of_torch(const View& out, const View& a, const View& b, double beta, double alpha) {
  const Tensor result = tensor_over(out), left = tensor_over(a), right = tensor_over(b);
  if (beta == 0.0 && alpha == 1.0) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
  } else {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), beta, alpha));
  }
}

const bool kMultiplies = (set_gemm(&gemm_of_torch), true);

void bottleneck_forward_op(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& down,
                           const Tensor& up, const std::optional<Tensor>& down_bias,
                           const std::optional<Tensor>& up_bias, const std::optional<Tensor>& scale_tensor,
                           double scale, int64_t activation, const Tensor& y, const Tensor& pre) {
  const char* op = "bottleneck_forward";
  bottleneck::forward({view_of(x, op, "x"), view_of(residual, op, "residual"), view_of(down, op, "down"),
                       view_of(up, op, "up"), view_of(down_bias, op, "down_bias"), view_of(up_bias, op, "up_bias"),
                       view_of(scale_tensor, op, "scale_tensor"), scale, activation, view_of(y, op, "y"),
                       view_of(pre, op, "pre")});
}

void bottleneck_backward_op(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& pre, const Tensor& down,
                            const Tensor& up, const std::optional<Tensor>& up_bias,
                            const std::optional<Tensor>& scale_tensor, double scale, int64_t activation, bool adds_dy,
                            const std::optional<Tensor>& dx, const std::optional<Tensor>& ddown,
                            const std::optional<Tensor>& dup, const std::optional<Tensor>& ddown_bias,
                            const std::optional<Tensor>& dup_bias, const std::optional<Tensor>& dscale) {
  const char* op = "bottleneck_backward";
  bottleneck::backward({view_of(dy, op, "dy"), view_of(x, op, "x"), view_of(pre, op, "pre"), view_of(down, op, "down"),
                        view_of(up, op, "up"), view_of(up_bias, op, "up_bias"),
                        view_of(scale_tensor, op, "scale_tensor"), scale, activation, adds_dy, view_of(dx, op, "dx"),
                        view_of(ddown, op, "ddown"), view_of(dup, op, "dup"), view_of(ddown_bias, op, "ddown_bias"),
                        view_of(dup_bias, op, "dup_bias"), view_of(dscale, op, "dscale")});
}

int64_t level_op() { return static_cast<int64_t>(level()); }

int64_t best_level_op() { return static_cast<int64_t>(best_level()); }

void set_level_op(int64_t number) {
  KF_CHECK(number >= 0 && number <= 2, "set_level: level must be 0 (scalar), 1 (avx2) or 2 (avx512); got ", number);
  set_level(static_cast<int>(number));
}

void parallel_for_of_torch(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(first, last, context); });
}

const bool kHooked = (set_parallel_for(&parallel_for_of_torch), true);

}  // namespace
}  // namespace kronafuse::cpu

STABLE_TORCH_LIBRARY(kronafuse_cpu, library) {
  library.def(
      "mix(Tensor? p, Tensor? left, Tensor? in_scale, Tensor? out_scale, Tensor? bias, Tensor? base, float scale, "
      "bool accumulate, Tensor(a!) y) -> ()");
  library.def("reduce(Tensor p, Tensor q, Tensor? p_scale, float scale, bool accumulate, Tensor(a!) out) -> ()");
  library.def("column_sums(Tensor p, Tensor? q, bool accumulate, Tensor(a!) out) -> ()");
  library.def("cast(Tensor source, Tensor(a!) out) -> ()");
  library.def("merge(Tensor weight, Tensor left, Tensor right, float scale, bool shuffled, Tensor(a!) out) -> ()");
  library.def(
      "bottleneck_forward(Tensor x, Tensor? residual, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, "
      "Tensor? scale_tensor, float scale, int activation, Tensor(a!) y, Tensor(b!) pre) -> ()");
  library.def(
      "bottleneck_backward(Tensor dy, Tensor? x, Tensor pre, Tensor down, Tensor up, Tensor? up_bias, "
      "Tensor? scale_tensor, float scale, int activation, bool adds_dy, Tensor(a!)? dx, Tensor(b!)? ddown, "
      "Tensor(c!)? dup, Tensor(d!)? ddown_bias, Tensor(e!)? dup_bias, Tensor(f!)? dscale) -> ()");
  library.def("level() -> int");
  library.def("best_level() -> int");
  library.def("set_level(int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kronafuse_cpu, CPU, library) {
  using namespace kronafuse::cpu;
  library.impl("mix", TORCH_BOX(&mix_op));
  library.impl("reduce", TORCH_BOX(&reduce_op));
  library.impl("column_sums", TORCH_BOX(&column_sums_op));
  library.impl("cast", TORCH_BOX(&cast_op));
  library.impl("merge", TORCH_BOX(&merge_op));
  library.impl("bottleneck_forward", TORCH_BOX(&bottleneck_forward_op));
  library.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(kronafuse_cpu, CompositeExplicitAutograd, library) {
  using namespace kronafuse::cpu;
  library.impl("level", TORCH_BOX(&level_op));
  library.impl("best_level", TORCH_BOX(&best_level_op));
  library.impl("set_level", TORCH_BOX(&set_level_op));
}
