// Factor gradients in two stages without atomics: parts of the rows to fp32 sums in a workspace, then their sum.
#include "cuda/kron_linear/reduce.h"

#include <algorithm>

#include "cuda/kron_linear/reduce.cuh"
#include "cuda/kron_linear/reduce_plan.h"

namespace kronafuse::cuda {
namespace {

// Traits of the second stage: 32 neighbouring elements a block, whose parts 8 warps share.
constexpr int kFinishColumns = 32;
constexpr int kFinishWarps = 8;
constexpr int kFinishThreads = kFinishColumns * kFinishWarps;

struct FinishParameters {
  const float* partial;  // (parts, rows, columns)
  int parts;
  int64_t columns, elements;
  float scale;
  const void* scale_tensor;
  DType scale_dtype;
  void* out;
  DType out_dtype;
  int64_t stride_row, stride_column;
};

KF_DEVICE void store_number(void* data, int64_t index, DType dtype, float value) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[index] = value;
      break;
    case DType::f32:
      static_cast<float*>(data)[index] = value;
      break;
    case DType::bf16:
      static_cast<bf16*>(data)[index] = from_float<bf16>(value);
      break;
    default:
      static_cast<f16*>(data)[index] = from_float<f16>(value);
  }
}

__global__ void __launch_bounds__(kFinishThreads) reduce_finish_kernel(const FinishParameters parameters) {
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  const int64_t element = int64_t{blockIdx.x} * kFinishColumns + lane();
  const bool valid = element < parameters.elements;
  float sum = 0.0f;
  if (valid) {
#pragma unroll 8
    for (int part = warp_index(); part < parameters.parts; part += kFinishWarps) {
      sum += parameters.partial[part * parameters.elements + element];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp_index() != 0 || !valid) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kFinishWarps; ++warp) total += sums[warp * kFinishColumns + lane()];
  // Rounded once, to the gradient's dtype.
  total *= scale_value(parameters.scale, parameters.scale_tensor, parameters.scale_dtype);
  const int64_t row = element / parameters.columns, column = element % parameters.columns;
  store_number(parameters.out, row * parameters.stride_row + column * parameters.stride_column, parameters.out_dtype,
               total);
}

ReducePlan plan_of(const View& p, const View& q) {
  return plan_reduce(p.size[0] * p.size[1], p.size[2], q.size[2],
                     p.size[2] * size_of(p.dtype) + q.size[2] * size_of(q.dtype), device_info());
}

template <class T>
ReduceOperand operand_of(const View& view, const std::optional<View>& scale) {
  ReduceOperand operand{};
  operand.data = view.data;
  operand.stride_m = view.stride[0];
  operand.stride_g = view.stride[1];
  operand.stride_f = view.stride[2];
  operand.features = static_cast<int>(view.size[2]);
  operand.is_float32 = view.dtype == DType::f32;
  if (scale) {
    operand.scale = scale->data;
    operand.scale_dtype = scale->dtype;
    operand.scale_stride_g = scale->stride[0];
    operand.scale_stride_f = scale->stride[1];
  }
  // Neighbours in memory: features, or the groups of a token, or tokens where there is one group.
  const bool one_group = view.size[1] == 1;
  const int64_t row_stride = one_group ? view.stride[0] : view.stride[1];
  const int64_t row_run = one_group ? view.size[0] : view.size[1];
  const bool by_features = view.stride[2] == 1 && view.size[2] > 1;
  operand.along_rows = !by_features && row_stride == 1;
  if (!(by_features || operand.along_rows)) return operand;

  // Whether `count` neighbours lie together wherever they begin, at multiples of `bytes`.
  const auto together = [&](int64_t count, int64_t bytes) {
    const int64_t run = by_features ? view.size[2] : row_run;
    const int neighbour = by_features ? 2 : one_group ? 0 : 1;
    const int64_t element = size_of(view.dtype);
    bool serves = run % count == 0 && static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data) % 16) % bytes == 0;
    for (int d = 0; d < 3; ++d) {
      if (d != neighbour && view.size[d] > 1) serves = serves && view.stride[d] * element % bytes == 0;
    }
    return serves;
  };
  if (operand.is_float32 || scale) {
    operand.by_eight = together(8, 16);
  } else {
    operand.piece = together(8, 16) ? 8 : together(4, 8) ? 4 : together(2, 4) ? 2 : 0;
  }
  return operand;
}

template <class T, ReduceForm Form>
void launch_parts(const ReduceArguments& arguments, const ReducePlan& plan) {
  using Traits = ReduceTraits<T, Form>;
  ReduceParameters parameters{};
  parameters.p = operand_of<T>(arguments.p, arguments.p_scale);
  parameters.q = operand_of<T>(arguments.q, std::nullopt);
  if (plan.swapped) std::swap(parameters.p, parameters.q);
  parameters.groups = Divider(static_cast<uint32_t>(arguments.p.size[1]));
  parameters.rows = static_cast<int>(arguments.p.size[0] * arguments.p.size[1]);
  parameters.steps_per_part = plan.steps_per_part;
  parameters.q_tiles = plan.tiles_q;
  parameters.partial = static_cast<float*>(arguments.workspace.data);
  const Dim3 grid{static_cast<unsigned>(plan.tiles_p * plan.tiles_q), static_cast<unsigned>(plan.parts)};
  launch<reduce_kernel<Traits>>(Launch{grid, Traits::kThreads, Traits::kConfiguration.shared_bytes, arguments.stream},
                                parameters);
}

void launch_finish(const ReduceArguments& arguments, const ReducePlan& plan) {
  const View& out = arguments.out;
  const int row = plan.swapped ? 1 : 0, column = 1 - row;
  FinishParameters parameters{};
  parameters.partial = static_cast<const float*>(arguments.workspace.data);
  parameters.parts = plan.parts;
  parameters.columns = out.size[column];
  parameters.elements = out.elements();
  parameters.scale = static_cast<float>(arguments.scale);
  if (arguments.scale_tensor) {
    parameters.scale_tensor = arguments.scale_tensor->data;
    parameters.scale_dtype = arguments.scale_tensor->dtype;
  }
  parameters.out = out.data;
  parameters.out_dtype = out.dtype;
  parameters.stride_row = out.stride[row];
  parameters.stride_column = out.stride[column];
  const Dim3 grid{static_cast<unsigned>((parameters.elements + kFinishColumns - 1) / kFinishColumns)};
  launch<reduce_finish_kernel>(Launch{grid, kFinishThreads, kFinishThreads * 4, arguments.stream}, parameters);
}

void check_operands(const View& p, const View& q) {
  KF_CHECK(p.dim == 3 && q.dim == 3 && p.size[0] == q.size[0] && p.size[1] == q.size[1],
           "reduce: p must be (M, G, P) and q (M, G, Q); got p ", Shape{p}, ", q ", Shape{q});
  const auto is_half = [](DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; };
  const bool one_half = (is_half(p.dtype) && q.dtype == DType::f32) || (p.dtype == DType::f32 && is_half(q.dtype));
  KF_CHECK((p.dtype == q.dtype && is_half(p.dtype)) || one_half,
           "reduce: p and q must both be float16 or both bfloat16, or one of them float32; got ", p.dtype, " and ",
           q.dtype);
  // Rows and the steps beyond the last one are counted in 32 bits.
  constexpr int64_t limit = (int64_t{1} << 31) - 65536;
  KF_CHECK(p.size[1] == 0 || p.size[0] <= limit / p.size[1], "reduce: M·G must be at most ", limit, "; got ", p.size[0],
           "·", p.size[1]);
  KF_CHECK(p.size[2] <= limit && q.size[2] <= limit && (q.size[2] == 0 || p.size[2] <= (limit << 4) / q.size[2]),
           "reduce: P·Q must be at most ", limit << 4, "; got ", p.size[2], "·", q.size[2]);
}

void check_arguments(const ReduceArguments& arguments) {
  const View &p = arguments.p, &q = arguments.q, &out = arguments.out, &workspace = arguments.workspace;
  check_operands(p, q);
  KF_CHECK(out.dim == 2 && out.size[0] == p.size[2] && out.size[1] == q.size[2],
           "reduce: out must be (P, Q) = (", p.size[2], ", ", q.size[2], "); got ", Shape{out});
  KF_CHECK(distinct_elements(out), "reduce: out's elements must not overlap; got strides ", Strides{out});
  if (arguments.p_scale) {
    const View& scale = *arguments.p_scale;
    KF_CHECK(scale.dim == 2 && scale.size[0] == p.size[1] && scale.size[1] == p.size[2],
             "reduce: p_scale must be (G, P) = (", p.size[1], ", ", p.size[2], "); got ", Shape{scale});
  }
  if (arguments.scale_tensor) {
    KF_CHECK(arguments.scale_tensor->elements() == 1, "reduce: scale_tensor must have one element; got ",
             Shape{*arguments.scale_tensor});
  }
  for (const View* operand : {&p, &q, &workspace}) {
    KF_CHECK(!ranges_meet(out, *operand), "reduce: out must share no memory with p, q or the workspace");
  }
  KF_CHECK(!ranges_meet(workspace, p) && !ranges_meet(workspace, q),
           "reduce: the workspace must share no memory with p or q");
  const int64_t needed = reduce_workspace(p, q);
  KF_CHECK(workspace.dtype == DType::f32 && workspace.elements() >= needed &&
               workspace.extent() == workspace.elements() && distinct_elements(workspace),
           "reduce: workspace must be contiguous float32 of at least ", needed, " elements; got ", workspace.dtype, " ",
           Shape{workspace}, " with strides ", Strides{workspace});
}

}  // namespace

int64_t reduce_workspace(const View& p, const View& q) {
  check_operands(p, q);
  return plan_of(p, q).parts * p.size[2] * q.size[2];
}

void reduce(const ReduceArguments& arguments) {
  check_arguments(arguments);
  if (arguments.out.empty()) return;
  const ReducePlan plan = plan_of(arguments.p, arguments.q);
  KF_CHECK(plan.parts <= 65535, "reduce: at most 65535 parts; got ", plan.parts);
  if (plan.parts > 0) {
    const DType dtype = arguments.p.dtype == DType::f32 ? arguments.q.dtype : arguments.p.dtype;
#ifdef KRONAFUSE_ONE_INSTANCE
    KF_CHECK(dtype == DType::bf16, "reduce: this build has the bfloat16 kernels alone; got ", dtype);
    launch_parts<bf16, kReduceMedium>(arguments, plan);
#else
    with_dtype(dtype, [&](auto tag) {
      using T = decltype(tag);
      switch (plan.form) {
        case kReduceTiny:
          return launch_parts<T, kReduceTiny>(arguments, plan);
        case kReduceNarrow:
          return launch_parts<T, kReduceNarrow>(arguments, plan);
        case kReduceMedium:
          return launch_parts<T, kReduceMedium>(arguments, plan);
        default:
          return launch_parts<T, kReduceWide>(arguments, plan);
      }
    });
#endif
  }
  launch_finish(arguments, plan);
}

}  // namespace kronafuse::cuda
