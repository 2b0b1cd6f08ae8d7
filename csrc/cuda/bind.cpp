// torch.ops.kronafuse_cuda, or kronafuse_emulated: tensors as views, through LibTorch's stable ABI. The one file here
// that knows torch. Every operator is a function of its own block, found in the tables at the end.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/view.h"
#include "cuda/bottleneck/bottleneck.h"
#include "cuda/common/stream.h"
#include "cuda/kron_linear/build.h"
#include "cuda/kron_linear/fat_linear.h"
#include "cuda/kron_linear/linear.h"
#include "cuda/kron_linear/mix.h"
#include "cuda/kron_linear/reduce.h"
#include "cuda/kron_linear/shrink.h"
#include "cuda/kron_merge/merge.h"
#ifdef KRONAFUSE_EMULATED
#include "cuda/emulation/emulation.h"
#endif

namespace kronafuse::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One call of an operator: the device its tensors share, made current for as long as the call lasts, and the current
// stream there.
class Call {
 public:
#ifdef KRONAFUSE_EMULATED
  Call(const char* op, const Tensor&) : op_(op) {}
#else
  Call(const char* op, const Tensor& first) : op_(op), device_(cuda_device(op, first)), guard_(device_) {}
#endif

  View operator()(const Tensor& tensor, const char* name) const {
#ifdef KRONAFUSE_EMULATED
    KF_CHECK(tensor.is_cpu(), op_, ": ", name, " must be on the CPU, where the kernels are emulated; got device type ",
             static_cast<int>(tensor.device().type()));
#else
    KF_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, op_, ": ", name, " must be on cuda:", device_,
             "; got device type ", static_cast<int>(tensor.device().type()), ", index ", tensor.get_device_index());
#endif
    const int64_t dim = tensor.dim();
    KF_CHECK(dim <= 4, op_, ": ", name, " must have at most 4 dimensions; got ", dim);
    View view;
    view.dtype = dtype(tensor, name);
    view.dim = static_cast<int>(dim);
    int64_t elements = 1;
    for (int i = 0; i < view.dim; ++i) {
      view.size[i] = tensor.size(i);
      view.stride[i] = tensor.stride(i);
      KF_CHECK(!__builtin_mul_overflow(elements, view.size[i], &elements), op_, ": ", name,
               " must have fewer than 2^63 elements; dimension ", i, " of ", dim, " has ", view.size[i]);
    }
    view.data = elements == 0 ? nullptr : tensor.data_ptr();
    KF_CHECK(elements == 0 || view.data != nullptr, op_, ": ", name, " of ", elements, " elements has no memory");
    return view;
  }

  std::optional<View> operator()(const std::optional<Tensor>& tensor, const char* name) const {
    if (!tensor) return std::nullopt;
    return (*this)(*tensor, name);
  }

  std::vector<View> operator()(const std::vector<Tensor>& tensors, const char* name) const {
    std::vector<View> views;
    views.reserve(tensors.size());
    for (const Tensor& tensor : tensors) views.push_back((*this)(tensor, name));
    return views;
  }

  std::vector<std::optional<View>> operator()(const std::vector<std::optional<Tensor>>& tensors,
                                              const char* name) const {
    std::vector<std::optional<View>> views;
    views.reserve(tensors.size());
    for (const std::optional<Tensor>& tensor : tensors) views.push_back((*this)(tensor, name));
    return views;
  }

  Stream stream() const {
#ifdef KRONAFUSE_EMULATED
    return nullptr;
#else
    // The one symbol of libtorch_cuda.so; looked up, so that the library links and loads beside a torch without CUDA.
    using Getter = int32_t (*)(int32_t, void**);
    static const auto getter = reinterpret_cast<Getter>([]() -> void* {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    }());
    KF_CHECK(getter != nullptr, op_, ": this torch has no CUDA (libtorch_cuda.so is not loaded)");
    void* stream = nullptr;
    KF_CHECK(getter(device_, &stream) == 0, op_, ": no current stream on cuda:", device_);
    return stream;
#endif
  }

 private:
#ifndef KRONAFUSE_EMULATED
  static int32_t cuda_device(const char* op, const Tensor& tensor) {
    KF_CHECK(tensor.is_cuda(), op, ": all tensors must be on one CUDA device; got one of device type ",
             static_cast<int>(tensor.device().type()));
    return tensor.get_device_index();
  }
#endif

  DType dtype(const Tensor& tensor, const char* name) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Double:
        return DType::f64;
      case ScalarType::Float:
        return DType::f32;
      case ScalarType::BFloat16:
        return DType::bf16;
      case ScalarType::Half:
        return DType::f16;
      default:
        KF_CHECK(false, op_, ": ", name, " must be float64, float32, bfloat16 or float16; got torch.ScalarType ",
                 static_cast<int>(tensor.scalar_type()));
    }
  }

  const char* op_;
#ifndef KRONAFUSE_EMULATED
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// bottleneck

void bottleneck_forward_op(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& down,
                           const Tensor& up, const std::optional<Tensor>& down_bias,
                           const std::optional<Tensor>& up_bias, const std::optional<Tensor>& scale_tensor,
                           double scale, int64_t activation, int64_t config, const std::optional<Tensor>& packed,
                           const Tensor& y, const Tensor& pre) {
  const Call view("bottleneck_forward", x);
  bottleneck::forward({view(x, "x"), view(residual, "residual"), view(down, "down"), view(up, "up"),
                       view(down_bias, "down_bias"), view(up_bias, "up_bias"), view(scale_tensor, "scale_tensor"),
                       scale, activation, config, view(packed, "packed"), view(y, "y"), view(pre, "pre")},
                      view.stream());
}

void bottleneck_backward_op(const Tensor& dy, const Tensor& pre, const Tensor& down, const Tensor& up,
                            const std::optional<Tensor>& scale_tensor, double scale, int64_t activation, bool adds_dy,
                            bool scales_bias, int64_t config, const std::optional<Tensor>& packed,
                            const std::optional<Tensor>& sums, const std::optional<Tensor>& dx,
                            const std::optional<Tensor>& hidden, const std::optional<Tensor>& dpre,
                            const std::optional<Tensor>& ddown_bias, const std::optional<Tensor>& dup_bias) {
  const Call view("bottleneck_backward", dy);
  bottleneck::backward({view(dy, "dy"), view(pre, "pre"), view(down, "down"), view(up, "up"),
                        view(scale_tensor, "scale_tensor"), scale, activation, adds_dy, scales_bias, config,
                        view(packed, "packed"), view(sums, "sums"), view(dx, "dx"), view(hidden, "hidden"),
                        view(dpre, "dpre"), view(ddown_bias, "ddown_bias"), view(dup_bias, "dup_bias")},
                       view.stream());
}

// linear, build

int checked_config(const char* op, int64_t config) {
  KF_CHECK(config >= -1 && config < (1 << 16), op, ": config must be -1 or a row of the table; got ", config);
  return static_cast<int>(config);
}

void linear_op(const std::optional<Tensor>& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& base, const std::vector<Tensor>& inners, const std::vector<Tensor>& ups,
               const std::optional<Tensor>& block_inner, const std::optional<Tensor>& block_up,
               const std::optional<Tensor>& block_scale, const std::optional<Tensor>& mix_inner,
               const std::optional<Tensor>& mix_left, const std::optional<Tensor>& mix_scale, bool shuffled,
               int64_t config, const Tensor& y) {
  const Call call("linear", y);
  KF_CHECK(inners.size() == ups.size() && inners.size() <= kDenseTails, "linear: inners and ups must be pairs, at most ",
           kDenseTails, "; got ", inners.size(), " and ", ups.size());
  KF_CHECK(block_inner.has_value() == block_up.has_value() && (block_inner || !block_scale),
           "linear: block_inner and block_up come together, block_scale with them");
  KF_CHECK(mix_inner.has_value() == mix_left.has_value() && (mix_inner || !mix_scale),
           "linear: mix_inner and mix_left come together, mix_scale with them");
  LinearArguments arguments;
  arguments.x = call(x, "x");
  arguments.weight = call(weight, "weight");
  arguments.bias = call(bias, "bias");
  arguments.base = call(base, "base");
  for (size_t i = 0; i < inners.size(); ++i) arguments.dense[i] = {call(inners[i], "inner"), call(ups[i], "up")};
  arguments.dense_count = static_cast<int>(inners.size());
  if (block_inner) {
    arguments.block = {call(*block_inner, "block_inner"), call(*block_up, "block_up"), call(block_scale, "block_scale")};
  }
  if (mix_inner) {
    arguments.mix = {call(*mix_inner, "mix_inner"), call(*mix_left, "mix_left"), call(mix_scale, "mix_scale")};
  }
  arguments.shuffled = shuffled;
  arguments.y = call(y, "y");
  arguments.stream = call.stream();
  KF_CHECK(config >= kChoosePlain && config < 2 * kHopperConfigs, "linear: no config ", config);
  linear(arguments, static_cast<int>(config));
}

bool linear_has_hopper_op() { return hopper_linear() != nullptr && device_info().major == 9; }

void build_op(const Tensor& factor, bool mixes, int64_t left, int64_t right, bool shuffled,
              const std::optional<Tensor>& feature_scale, const Tensor& out) {
  const Call call("build", out);
  build({call(factor, "factor"), mixes, left, right, shuffled, call(feature_scale, "feature_scale"), call(out, "out"),
         call.stream()});
}

// fat_linear

void fat_linear_op(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& base, const Tensor& a, const Tensor& b,
                   const std::optional<Tensor>& in_scale, const std::optional<Tensor>& out_scale, double scale,
                   const std::optional<Tensor>& scale_tensor, bool in_shuffled, bool out_shuffled, int64_t config,
                   const Tensor& y) {
  const Call call("fat_linear", y);
  FatArguments arguments;
  arguments.x = call(x, "x");
  arguments.weight = call(weight, "weight");
  arguments.bias = call(bias, "bias");
  arguments.base = call(base, "base");
  arguments.a = call(a, "a");
  arguments.b = call(b, "b");
  arguments.in_scale = call(in_scale, "in_scale");
  arguments.out_scale = call(out_scale, "out_scale");
  arguments.scale = static_cast<float>(scale);
  arguments.scale_tensor = call(scale_tensor, "scale_tensor");
  arguments.in_shuffled = in_shuffled;
  arguments.out_shuffled = out_shuffled;
  arguments.y = call(y, "y");
  arguments.stream = call.stream();
  fat_linear(arguments, checked_config("fat_linear", config));
}

// merge

void merge_op(const Tensor& weight, const std::optional<Tensor>& a, const Tensor& b,
              const std::optional<Tensor>& b_down, double scale, const std::optional<Tensor>& scale_tensor,
              bool shuffled, const Tensor& out) {
  const Call call("merge", out);
  MergeArguments arguments;
  arguments.weight = call(weight, "weight");
  arguments.a = call(a, "a");
  arguments.b = call(b, "b");
  arguments.b_down = call(b_down, "b_down");
  arguments.scale = scale;
  arguments.scale_tensor = call(scale_tensor, "scale_tensor");
  arguments.shuffled = shuffled;
  arguments.out = call(out, "out");
  arguments.stream = call.stream();
  merge(arguments);
}

// shrink, mix

Contraction contraction_of(const Call& call, const Tensor& x, const std::vector<Tensor>& factors) {
  Contraction contraction;
  contraction.x = call(x, "x");
  for (const Tensor& factor : factors) contraction.factors.push_back({call(factor, "a factor"), 1.0, {}, {}});
  contraction.stream = call.stream();
  return contraction;
}

Contraction contraction_of(const Call& call, const char* op, const Tensor& x, const std::vector<Tensor>& factors,
                           const std::vector<double>& scales, const std::vector<std::optional<Tensor>>& scale_tensors,
                           const std::optional<Tensor>& in_scale, const std::optional<Tensor>& workspace,
                           const std::vector<Tensor>& outs) {
  KF_CHECK(scales.size() == factors.size() && scale_tensors.size() == factors.size() && outs.size() == factors.size(), op,
           ": every factor has a scale, a scale tensor or None, and an output; got ", factors.size(), " factors, ",
           scales.size(), " scales, ", scale_tensors.size(), " scale tensors and ", outs.size(), " outputs");
  Contraction contraction = contraction_of(call, x, factors);
  contraction.in_scale = call(in_scale, "in_scale");
  contraction.workspace = call(workspace, "workspace");
  for (size_t i = 0; i < factors.size(); ++i) {
    contraction.factors[i].scale = scales[i];
    contraction.factors[i].scale_tensor = call(scale_tensors[i], "a scale tensor");
    contraction.factors[i].out = call(outs[i], "an output");
  }
  return contraction;
}

void shrink_op(const Tensor& x, const std::vector<Tensor>& downs, const std::vector<double>& scales,
               const std::vector<std::optional<Tensor>>& scale_tensors, const std::optional<Tensor>& in_scale,
               const std::optional<Tensor>& workspace, const std::vector<Tensor>& outs) {
  const Call call("shrink", x);
  shrink(contraction_of(call, "shrink", x, downs, scales, scale_tensors, in_scale, workspace, outs));
}

int64_t shrink_workspace_op(const Tensor& x, const std::vector<Tensor>& downs) {
  const Call call("shrink_workspace", x);
  return shrink_workspace(contraction_of(call, x, downs));
}

void mix_op(const Tensor& x, const std::vector<Tensor>& lefts, const std::vector<double>& scales,
            const std::vector<std::optional<Tensor>>& scale_tensors, const std::optional<Tensor>& in_scale,
            const std::optional<Tensor>& base, const std::optional<Tensor>& out_scale,
            const std::optional<Tensor>& workspace, const std::vector<Tensor>& outs) {
  const Call call("mix", x);
  Contraction contraction =
      contraction_of(call, "mix", x, lefts, scales, scale_tensors, in_scale, workspace, outs);
  contraction.base = call(base, "base");
  contraction.out_scale = call(out_scale, "out_scale");
  mix(contraction);
}

int64_t mix_workspace_op(const Tensor& x, const std::vector<Tensor>& lefts) {
  const Call call("mix_workspace", x);
  return mix_workspace(contraction_of(call, x, lefts));
}

// reduce

void reduce_op(const Tensor& p, const Tensor& q, const std::optional<Tensor>& p_scale, double scale,
               const std::optional<Tensor>& scale_tensor, const Tensor& workspace, const Tensor& out) {
  const Call call("reduce", out);
  reduce({call(p, "p"), call(q, "q"), call(p_scale, "p_scale"), scale, call(scale_tensor, "scale_tensor"),
          call(workspace, "workspace"), call(out, "out"), call.stream()});
}

int64_t reduce_workspace_op(const Tensor& p, const Tensor& q) {
  const Call call("reduce_workspace", p);
  return reduce_workspace(call(p, "p"), call(q, "q"));
}

#ifdef KRONAFUSE_EMULATED

// emulation

void emulation_settings_op(int64_t multiprocessors, int64_t shared_per_block, int64_t major, int64_t minor,
                           int64_t seed) {
  KF_CHECK(multiprocessors > 0 && shared_per_block >= 0 && shared_per_block <= 227 * 1024,
           "emulation_settings: needs multiprocessors > 0 and shared_per_block up to 227 KiB; got ", multiprocessors,
           " and ", shared_per_block);
  emulation::settings() = {static_cast<int>(multiprocessors), static_cast<int>(shared_per_block),
                           static_cast<int>(major), static_cast<int>(minor), static_cast<uint64_t>(seed)};
}

#endif

}  // namespace
}  // namespace kronafuse::cuda

#ifdef KRONAFUSE_EMULATED
#define KRONAFUSE_NAMESPACE kronafuse_emulated
#define KRONAFUSE_DEVICE CPU
#else
#define KRONAFUSE_NAMESPACE kronafuse_cuda
#define KRONAFUSE_DEVICE CUDA
#endif
// The macros of torch paste their arguments before they expand them.
#define KRONAFUSE_LIBRARY(name, library) STABLE_TORCH_LIBRARY(name, library)
#define KRONAFUSE_LIBRARY_IMPL(name, device, library) STABLE_TORCH_LIBRARY_IMPL(name, device, library)

KRONAFUSE_LIBRARY(KRONAFUSE_NAMESPACE, library) {
  library.def(
      "linear(Tensor? x, Tensor? weight, Tensor? bias, Tensor? base, Tensor[] inners, Tensor[] ups, "
      "Tensor? block_inner, Tensor? block_up, Tensor? block_scale, Tensor? mix_inner, Tensor? mix_left, "
      "Tensor? mix_scale, bool shuffled, int config, Tensor(a!) y) -> ()");
  library.def(
      "reduce(Tensor p, Tensor q, Tensor? p_scale, float scale, Tensor? scale_tensor, Tensor(a!) workspace, "
      "Tensor(b!) out) -> ()");
  library.def("reduce_workspace(Tensor p, Tensor q) -> int");
  library.def("linear_has_hopper() -> bool");
  library.def(
      "build(Tensor factor, bool mixes, int left, int right, bool shuffled, Tensor? feature_scale, Tensor(a!) out) "
      "-> ()");
  library.def(
      "bottleneck_forward(Tensor x, Tensor? residual, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, "
      "Tensor? scale_tensor, float scale, int activation, int config, Tensor(a!)? packed, Tensor(b!) y, "
      "Tensor(c!) pre) -> ()");
  library.def(
      "bottleneck_backward(Tensor dy, Tensor pre, Tensor down, Tensor up, Tensor? scale_tensor, float scale, "
      "int activation, bool adds_dy, bool scales_bias, int config, Tensor(a!)? packed, Tensor(b!)? sums, "
      "Tensor(c!)? dx, Tensor(d!)? hidden, Tensor(e!)? dpre, Tensor(f!)? ddown_bias, Tensor(g!)? dup_bias) -> ()");
  library.def(
      "fat_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor a, Tensor b, Tensor? in_scale, "
      "Tensor? out_scale, float scale, Tensor? scale_tensor, bool in_shuffled, bool out_shuffled, int config, "
      "Tensor(a!) y) -> ()");
  library.def(
      "merge(Tensor weight, Tensor? a, Tensor b, Tensor? b_down, float scale, Tensor? scale_tensor, bool shuffled, "
      "Tensor(a!) out) -> ()");
  library.def(
      "shrink(Tensor x, Tensor[] downs, float[] scales, Tensor?[] scale_tensors, Tensor? in_scale, "
      "Tensor(a!)? workspace, Tensor(b!)[] outs) -> ()");
  library.def("shrink_workspace(Tensor x, Tensor[] downs) -> int");
  library.def(
      "mix(Tensor x, Tensor[] lefts, float[] scales, Tensor?[] scale_tensors, Tensor? in_scale, Tensor? base, "
      "Tensor? out_scale, Tensor(a!)? workspace, Tensor(b!)[] outs) -> ()");
  library.def("mix_workspace(Tensor x, Tensor[] lefts) -> int");
#ifdef KRONAFUSE_EMULATED
  library.def(
      "emulation_settings(int multiprocessors, int shared_per_block, int major, int minor, int seed) -> ()");
#endif
}

KRONAFUSE_LIBRARY_IMPL(KRONAFUSE_NAMESPACE, KRONAFUSE_DEVICE, library) {
  using namespace kronafuse::cuda;
  library.impl("linear", TORCH_BOX(&linear_op));
  library.impl("build", TORCH_BOX(&build_op));
  library.impl("fat_linear", TORCH_BOX(&fat_linear_op));
  library.impl("reduce", TORCH_BOX(&reduce_op));
  library.impl("reduce_workspace", TORCH_BOX(&reduce_workspace_op));
  library.impl("merge", TORCH_BOX(&merge_op));
  library.impl("bottleneck_forward", TORCH_BOX(&bottleneck_forward_op));
  library.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward_op));
  library.impl("shrink", TORCH_BOX(&shrink_op));
  library.impl("shrink_workspace", TORCH_BOX(&shrink_workspace_op));
  library.impl("mix", TORCH_BOX(&mix_op));
  library.impl("mix_workspace", TORCH_BOX(&mix_workspace_op));
}

KRONAFUSE_LIBRARY_IMPL(KRONAFUSE_NAMESPACE, CompositeExplicitAutograd, library) {
  using namespace kronafuse::cuda;
  library.impl("linear_has_hopper", TORCH_BOX(&linear_has_hopper_op));
#ifdef KRONAFUSE_EMULATED
  library.impl("emulation_settings", TORCH_BOX(&emulation_settings_op));
#endif
}
