// Dense forms of thin maps: one launch writes the zeros and the factor's elements.
#include "cuda/kron_linear/build.h"

#include "cuda/common/launch.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/kron_linear/values.cuh"

namespace kronafuse::cuda {
namespace {

// Traits.
constexpr int kBuildThreads = 256;
constexpr int kBuildChunk = 8;  // elements that a thread writes, neighbours in `out`

struct BuildParameters {
  const void* factor;
  DType factor_dtype;
  int64_t stride_feature, stride_t;  // of the factor
  bool mixes, shuffled;
  int left, right, inner;  // inner: values of t2
  Values feature_scale;
  void* out;
  int features, width;
  int64_t out_feature, out_t;  // strides
  bool along_features;         // of a chunk
  bool vectors;                // whole chunks, aligned
  int chunks;                  // in a row of chunks
  int64_t total;
};

KF_DEVICE float build_element(const BuildParameters& p, int across, int along) {
  const int feature = p.along_features ? along : across, t = p.along_features ? across : along;
  const int f1 = p.shuffled ? feature % p.left : feature / p.right;
  const int f2 = p.shuffled ? feature / p.left : feature % p.right;
  const int t1 = t / p.inner, t2 = t % p.inner;
  if (p.mixes ? f2 != t2 : f1 != t1) return 0.f;
  const int64_t index = (p.mixes ? f1 : f2) * p.stride_feature + (p.mixes ? t1 : t2) * p.stride_t;
  const float value = load_number(p.factor, index, p.factor_dtype);
  // Rounding point: once, after the row scale, from the factor's own dtype.
  return p.feature_scale.data != nullptr ? value * p.feature_scale(feature) : value;
}

// Kernel.
template <class T>
__global__ void __launch_bounds__(kBuildThreads) build_kernel(const __grid_constant__ BuildParameters p) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (chunk >= p.total) return;
  const int across = static_cast<int>(chunk / p.chunks);
  const int along = static_cast<int>(chunk % p.chunks) * kBuildChunk;
  const int length = p.along_features ? p.features : p.width;
  const int64_t step = p.along_features ? p.out_feature : p.out_t;
  T* target = static_cast<T*>(p.out) + across * (p.along_features ? p.out_t : p.out_feature) + along * step;
  if (p.vectors) {
    Vec16<T> values;
#pragma unroll
    for (int e = 0; e < kBuildChunk; ++e) values[e] = from_float<T>(build_element(p, across, along + e));
    store_16(target, values);
  } else {
    for (int e = 0; e < kBuildChunk && along + e < length; ++e) {
      target[e * step] = from_float<T>(build_element(p, across, along + e));
    }
  }
}

// Launch.
template <class T>
void launch_build(const BuildParameters& parameters, Stream stream) {
  const int64_t blocks = (parameters.total + kBuildThreads - 1) / kBuildThreads;
  KF_CHECK(blocks < (int64_t{1} << 31), "build: out must have under 2^31 blocks of elements; got ", blocks);
  const Launch how{Dim3{static_cast<unsigned>(blocks), 1, 1}, kBuildThreads, 0, stream};
  launch<build_kernel<T>>(how, parameters);
}

// Typed entry.
void check_build(const BuildArguments& arguments) {
  const View &factor = arguments.factor, &out = arguments.out;
  const int64_t left = arguments.left, right = arguments.right;
  constexpr int64_t limit = int64_t{1} << 31;
  KF_CHECK(factor.dim == 2 && factor.size[1] > 0, "build: factor must be a matrix of at least 1×1; got ",
           Shape{factor});
  KF_CHECK(left > 0 && right > 0 && left < limit && right < limit && left * right < limit,
           "build: left·right must be positive and under 2^31; got ", left, "·", right);
  KF_CHECK(factor.size[0] == (arguments.mixes ? left : right), "build: factor must have ",
           arguments.mixes ? "left" : "right", " = ", arguments.mixes ? left : right, " rows; got ", Shape{factor});
  const int64_t columns = factor.size[1], beside = arguments.mixes ? right : left;
  KF_CHECK(columns < limit && columns * beside < limit, "build: width must be under 2^31; got ", columns, "·", beside);
  KF_CHECK(out.dim == 2 && out.size[0] == left * right && out.size[1] == columns * beside, "build: out must be (",
           left * right, ", ", columns * beside, "); got ", Shape{out});
  KF_CHECK(out.dtype == DType::f16 || out.dtype == DType::bf16, "build: out must be float16 or bfloat16; got ",
           out.dtype);
  KF_CHECK(distinct_elements(out), "build: out's elements must lie apart; got strides ", Strides{out}, " of ",
           Shape{out});
  if (arguments.feature_scale) {
    const View& scale = *arguments.feature_scale;
    KF_CHECK(scale.dim == 1 && scale.size[0] == left * right, "build: feature_scale must be (", left * right, "); got ",
             Shape{scale});
  }
}

BuildParameters build_parameters(const BuildArguments& from) {
  const View& out = from.out;
  BuildParameters to{};
  to.factor = from.factor.data;
  to.factor_dtype = from.factor.dtype;
  to.stride_feature = from.factor.stride[0];
  to.stride_t = from.factor.stride[1];
  to.mixes = from.mixes;
  to.shuffled = from.shuffled;
  to.left = static_cast<int>(from.left);
  to.right = static_cast<int>(from.right);
  to.inner = static_cast<int>(from.mixes ? from.right : from.factor.size[1]);
  if (from.feature_scale) {
    to.feature_scale = {from.feature_scale->data, from.feature_scale->dtype, from.feature_scale->stride[0]};
  }
  to.out = out.data;
  to.features = static_cast<int>(out.size[0]);
  to.width = static_cast<int>(out.size[1]);
  to.out_feature = out.stride[0];
  to.out_t = out.stride[1];
  to.along_features = out.stride[1] != 1 && out.stride[0] == 1;
  const int along = to.along_features ? 0 : 1, across = 1 - along;
  to.vectors = reinterpret_cast<uintptr_t>(out.data) % 16 == 0 && out.stride[along] == 1 &&
               out.size[along] % kBuildChunk == 0 && (out.size[across] <= 1 || out.stride[across] % kBuildChunk == 0);
  to.chunks = static_cast<int>((out.size[along] + kBuildChunk - 1) / kBuildChunk);
  to.total = to.chunks * out.size[across];
  return to;
}

}  // namespace

void build(const BuildArguments& arguments) {
  check_build(arguments);
  const BuildParameters parameters = build_parameters(arguments);
  with_dtype(arguments.out.dtype,
             [&](auto element) { launch_build<decltype(element)>(parameters, arguments.stream); });
}

}  // namespace kronafuse::cuda
