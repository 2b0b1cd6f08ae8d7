#include "cuda/bottleneck/bottleneck.h"
#include "cuda/bottleneck/rows_launch.cuh"
#include "cuda/bottleneck/sums.h"

namespace kronafuse::cuda::bottleneck {

namespace {

constexpr const char* BACKWARD = "bottleneck_backward";

void check_bias(const char* name, const char* letter, const std::optional<View>& bias, int64_t size) {
  KF_CHECK(!bias || (bias->dim == 1 && bias->size[0] == size), BACKWARD, ": ", name, " must be (", letter, ",) = (",
           size, ",); got ", Shape{*bias});
}

void check_hidden(const char* name, const std::optional<View>& view, const BackwardCall& call) {
  if (!view) return;
  check_written_hidden(BACKWARD, name, *view, call.dy.size[0], call.down.size[0]);
  KF_CHECK(view->dtype == call.pre.dtype, BACKWARD, ": ", name, " must be ", call.pre.dtype, " like pre; got ",
           view->dtype);
}

void check(const BackwardCall& call) {
  const View& dy = call.dy;
  check_factors(BACKWARD, call.down, call.up, call.scale ? &*call.scale : nullptr, call.activation, call.pre.dtype);
  const int64_t tokens = dy.dim == 2 ? dy.size[0] : -1, width = call.down.size[0];
  KF_CHECK(dy.dim == 2 && dy.size[1] == call.up.size[0], BACKWARD, ": dy must be (M, N) with N = ", call.up.size[0],
           "; got ", Shape{dy});
  // Where only the up bias asks for a gradient there is no pre-activation.
  if (call.dx || call.hidden || call.dpre || call.ddown_bias) {
    check_contiguous(BACKWARD, "pre", call.pre, tokens, width);
  }
  if (call.dx) {
    check_contiguous(BACKWARD, "dx", *call.dx, tokens, call.down.size[1]);
    KF_CHECK(!ranges_meet(dy, *call.dx), BACKWARD, ": dx must not overlap dy");
    KF_CHECK(!call.adds_dy || call.down.size[1] == call.up.size[0], BACKWARD,
             ": where the residual is x, N must equal K = ", call.down.size[1], "; got ", call.up.size[0]);
  }
  check_hidden("hidden", call.hidden, call);
  check_hidden("dpre", call.dpre, call);
  check_bias("ddown_bias", "H", call.ddown_bias, width);
  check_bias("dup_bias", "N", call.dup_bias, call.up.size[0]);
}

// Room for the column sums of every block of rows: in_sums, then hidden_sums.
float* workspace(const BackwardCall& call) {
  if (!call.ddown_bias && !call.dup_bias) return nullptr;
  const int64_t blocks = blocks_of(call.dy.size[0], TILES[SMALL].block_m);
  const int64_t needed = blocks * (call.up.size[0] + call.down.size[0]);
  KF_CHECK(call.sums && call.sums->dtype == DType::f32 && call.sums->dim == 1 && call.sums->size[0] >= needed &&
               (call.sums->stride[0] == 1 || needed <= 1),
           BACKWARD, ": sums must be ⌈M / ", TILES[SMALL].block_m, "⌉ · (N + H) = ", needed,
           " contiguous float32 elements; got ", call.sums ? call.sums->elements() : 0);
  return static_cast<float*>(call.sums->data);
}

}  // namespace

void backward(const BackwardCall& call, Stream stream) {
  check(call);
  const DType compute = call.pre.dtype;
  const int64_t tokens = call.dy.size[0];
  float* const sums = workspace(call);
  RowsArguments args{};
  args.in = features_of(call.dy, compute);
  args.added = call.adds_dy && call.dx ? args.in : no_features();
  args.product = call.dx || call.dpre || call.ddown_bias;
  if (args.product && tokens > 0) {
    const Factors factors =
        ready_factors(BACKWARD, call.down, call.up, compute, call.packed ? &*call.packed : nullptr, stream);
    args.first = factors.up;
    args.second = factors.down;
  }
  args.scale = vector_of(call.scale ? &*call.scale : nullptr);
  args.scale_number = static_cast<float>(call.scale_number);
  args.pre = call.pre.data;
  args.reads_pre = args.product || call.hidden;
  args.pre_vectors = call.pre.dim == 2 && features_of(call.pre, compute).reading == Reading::COPY;
  args.tokens = tokens;
  args.in_features = static_cast<int>(call.up.size[0]);
  args.width = static_cast<int>(call.down.size[0]);
  args.out_features = static_cast<int>(call.down.size[1]);
  args.activation = static_cast<int>(call.activation);
  if (call.hidden) args.hidden = call.hidden->data;
  if (call.dpre) args.dpre = call.dpre->data;
  if (call.dx) {
    args.out = call.dx->data;
    args.out_dtype = call.dx->dtype;
    args.out_vectors = stores_in_chunks(*call.dx, compute) && args.added.reading != Reading::ELEMENTS;
  }
  if (call.dup_bias) args.in_sums = sums;
  if (call.ddown_bias) args.hidden_sums = sums + blocks_of(tokens, TILES[SMALL].block_m) * call.up.size[0];
  const int64_t blocks = launch_rows<true>(BACKWARD, args, compute, call.config, stream);

  SumsJob jobs[2];
  int count = 0;
  if (call.ddown_bias) {
    const View& out = *call.ddown_bias;
    jobs[count++] = {args.hidden_sums, args.width, vector_of(nullptr), 1.0f, out.data, out.stride[0], out.dtype};
  }
  if (call.dup_bias) {
    const View& out = *call.dup_bias;
    const Vector scale = call.scales_bias ? args.scale : vector_of(nullptr);
    const float number = call.scales_bias ? args.scale_number : 1.0f;
    jobs[count++] = {args.in_sums, args.in_features, scale, number, out.data, out.stride[0], out.dtype};
  }
  if (count > 0) sum_blocks(jobs, count, blocks, stream);
}

}  // namespace kronafuse::cuda::bottleneck
