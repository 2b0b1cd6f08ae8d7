#include "cuda/bottleneck/bottleneck.h"
#include "cuda/bottleneck/rows_launch.cuh"

namespace kronafuse::cuda::bottleneck {

namespace {

constexpr const char* FORWARD = "bottleneck_forward";

void check(const ForwardCall& call, bool keeps) {
  const View& x = call.x;
  const DType compute = call.pre.dtype;
  check_factors(FORWARD, call.down, call.up, call.scale ? &*call.scale : nullptr, call.activation, compute);
  const int64_t tokens = x.dim == 2 ? x.size[0] : -1, width = call.down.size[0], features = call.up.size[0];
  KF_CHECK(x.dim == 2 && x.size[1] == call.down.size[1], FORWARD, ": x must be (M, K) with K = ", call.down.size[1],
           "; got ", Shape{x});
  check_contiguous(FORWARD, "y", call.y, tokens, features);
  KF_CHECK(keeps || (call.pre.dim == 1 && call.pre.empty()), FORWARD, ": pre must be (", tokens, ", ", width,
           "), or (0) where it is not kept; got ", Shape{call.pre});
  if (keeps) check_written_hidden(FORWARD, "pre", call.pre, tokens, width);
  if (call.residual) {
    KF_CHECK(call.residual->dim == 2 && call.residual->size[0] == tokens && call.residual->size[1] == features, FORWARD,
             ": residual must be (M, N) = (", tokens, ", ", features, "); got ", Shape{*call.residual});
    KF_CHECK(!ranges_meet(*call.residual, call.y), FORWARD, ": y must not overlap the residual");
  }
  KF_CHECK(!ranges_meet(x, call.y), FORWARD, ": y must not overlap x");
  KF_CHECK(!call.down_bias || (call.down_bias->dim == 1 && call.down_bias->size[0] == width), FORWARD,
           ": down_bias must be (H,) = (", width, ",); got ", Shape{*call.down_bias});
  KF_CHECK(!call.up_bias || (call.up_bias->dim == 1 && call.up_bias->size[0] == features), FORWARD,
           ": up_bias must be (N,) = (", features, ",); got ", Shape{*call.up_bias});
}

}  // namespace

void forward(const ForwardCall& call, Stream stream) {
  const bool keeps = call.pre.dim == 2;
  check(call, keeps);
  if (call.x.size[0] == 0) return;
  const DType compute = call.pre.dtype;
  const Factors factors =
      ready_factors(FORWARD, call.down, call.up, compute, call.packed ? &*call.packed : nullptr, stream);
  RowsArguments args{};
  args.in = features_of(call.x, compute);
  args.added = call.residual ? features_of(*call.residual, compute) : no_features();
  args.first = factors.down;
  args.second = factors.up;
  args.in_bias = vector_of(call.down_bias ? &*call.down_bias : nullptr);
  args.out_bias = vector_of(call.up_bias ? &*call.up_bias : nullptr);
  args.scale = vector_of(call.scale ? &*call.scale : nullptr);
  args.scale_number = static_cast<float>(call.scale_number);
  args.out = call.y.data;
  args.pre = keeps ? call.pre.data : nullptr;
  args.tokens = call.x.size[0];
  args.in_features = static_cast<int>(call.x.size[1]);
  args.width = static_cast<int>(call.down.size[0]);
  args.out_features = static_cast<int>(call.up.size[0]);
  args.activation = static_cast<int>(call.activation);
  args.out_dtype = call.y.dtype;
  args.out_vectors = stores_in_chunks(call.y, compute) && args.added.reading != Reading::ELEMENTS;
  args.product = true;
  launch_rows<false>(FORWARD, args, compute, call.config, stream);
}

}  // namespace kronafuse::cuda::bottleneck
