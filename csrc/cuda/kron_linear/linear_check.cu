// What a call of `linear` must keep, whichever form serves it.
#include "cuda/kron_linear/linear.h"

namespace kronafuse::cuda {
namespace {

// Tiles reach past the last row by less than this, in 32-bit indices.
constexpr int64_t kMaxSize = (int64_t{1} << 31) - 1024;

void check_dtype(const char* name, const View& view, DType dtype) {
  KF_CHECK(view.dtype == dtype, "linear: ", name, " must have y's dtype ", dtype, "; got ", view.dtype);
}

void check_factor(const char* name, const View& view, DType dtype) {
  KF_CHECK(view.dtype == dtype || view.dtype == DType::f32, "linear: ", name, " must have y's dtype ", dtype,
           " or float32; got ", view.dtype);
}

void check_matrix(const char* name, const View& view, const char* letters, int64_t rows, int64_t columns) {
  KF_CHECK(view.dim == 2 && view.size[0] == rows && view.size[1] == columns, "linear: ", name, " must be ", letters,
           " = (", rows, ", ", columns, "); got ", Shape{view});
}

void check_features(const char* name, const std::optional<View>& view, int64_t features) {
  if (!view) return;
  KF_CHECK(view->dim == 1 && view->size[0] == features, "linear: ", name, " must be (N,) = (", features, "); got ",
           Shape{*view});
}

void check_pairs(const LinearArguments& arguments, int64_t tokens, int64_t features, DType dtype) {
  KF_CHECK(arguments.dense_count >= 0 && arguments.dense_count <= kDenseTails, "linear: at most ", kDenseTails,
           " dense tails; got ", arguments.dense_count);
  for (int i = 0; i < arguments.dense_count; ++i) {
    const View &t = arguments.dense[i].t, &up = arguments.dense[i].up;
    KF_CHECK(t.dim == 2 && t.size[1] < kMaxSize, "linear: inner ", i, " must be (M, width) with width under ", kMaxSize,
             "; got ", Shape{t});
    check_matrix("inner", t, "(M, width)", tokens, t.size[1]);
    check_matrix("up", up, "(N, width)", features, t.size[1]);
    check_dtype("inner", t, dtype);
    check_dtype("up", up, dtype);
  }
}

void check_block(const BlockTail& block, int64_t tokens, int64_t features, DType dtype) {
  const View &inner = block.inner, &up = block.up;
  KF_CHECK(inner.dim == 3 && up.dim == 2 && inner.size[0] == tokens && inner.size[2] == up.size[1] &&
               up.size[0] > 0 && features % up.size[0] == 0 && inner.size[1] == features / up.size[0] &&
               up.size[1] < kMaxSize,
           "linear: block_inner must be (M, N1, R) and block_up (N2, R) with M = ", tokens, ", N1·N2 = N = ", features,
           "; got ", Shape{inner}, ", ", Shape{up});
  check_dtype("block_inner", inner, dtype);
  check_factor("block_up", up, dtype);
  check_features("out_scale", block.out_scale, features);
}

void check_mix(const MixTail& mix, int64_t tokens, int64_t features, DType dtype) {
  const View &inner = mix.inner, &left = mix.left;
  KF_CHECK(inner.dim == 3 && left.dim == 2 && inner.size[0] == tokens && inner.size[1] == left.size[1] &&
               left.size[0] > 0 && features % left.size[0] == 0 && inner.size[2] == features / left.size[0] &&
               left.size[1] < kMaxSize,
           "linear: mix_inner must be (M, J, N2) and mix_left (N1, J) with M = ", tokens, ", N1·N2 = N = ", features,
           "; got ", Shape{inner}, ", ", Shape{left});
  check_dtype("mix_inner", inner, dtype);
  check_factor("mix_left", left, dtype);
  check_features("out_scale", mix.out_scale, features);
}

}  // namespace

void check_linear(const LinearArguments& arguments) {
  const View& y = arguments.y;
  KF_CHECK(y.dtype == DType::f16 || y.dtype == DType::bf16, "linear: y must be float16 or bfloat16; got ", y.dtype);
  KF_CHECK(y.dim == 2 && y.size[0] < kMaxSize && y.size[1] < kMaxSize, "linear: y must be (M, N) with sizes under ",
           kMaxSize, "; got ", Shape{y});
  KF_CHECK(distinct_elements(y), "linear: y's elements must lie apart; got strides ", Strides{y}, " of ", Shape{y});
  const int64_t tokens = y.size[0], features = y.size[1];
  if (arguments.weight) {
    KF_CHECK(arguments.x.has_value(), "linear: weight comes with x; got no x");
    const View &x = *arguments.x, &weight = *arguments.weight;
    KF_CHECK(x.dim == 2 && x.size[1] < kMaxSize, "linear: x must be (M, K) with K under ", kMaxSize, "; got ",
             Shape{x});
    check_matrix("x", x, "(M, K)", tokens, x.size[1]);
    check_matrix("weight", weight, "(N, K)", features, x.size[1]);
    check_dtype("x", x, y.dtype);
    check_dtype("weight", weight, y.dtype);
  }
  check_features("bias", arguments.bias, features);
  if (arguments.base) {
    const View& base = *arguments.base;
    check_matrix("base", base, "(M, N)", tokens, features);
    check_dtype("base", base, y.dtype);
    KF_CHECK(base.data != y.data || base.empty() || (base.stride[0] == y.stride[0] && base.stride[1] == y.stride[1]),
             "linear: base may be y itself, with its strides ", Strides{y}, "; got ", Strides{base});
  }
  check_pairs(arguments, tokens, features, y.dtype);
  if (arguments.block) check_block(*arguments.block, tokens, features, y.dtype);
  if (arguments.mix) check_mix(*arguments.mix, tokens, features, y.dtype);
  if (arguments.block && arguments.mix) {
    KF_CHECK(arguments.block->up.size[0] == arguments.mix->inner.size[2],
             "linear: block and mix tail must share N2; got ", arguments.block->up.size[0], " and ",
             arguments.mix->inner.size[2]);
  }
}

}  // namespace kronafuse::cuda
