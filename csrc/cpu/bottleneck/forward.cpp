#include <algorithm>

#include "cpu/bottleneck/bottleneck.h"
#include "cpu/bottleneck/checks.h"
#include "cpu/bottleneck/passes.h"
#include "cpu/common/gemm.h"

namespace kronafuse::cpu::bottleneck {
namespace {

constexpr const char* kForward = "bottleneck_forward";
constexpr int64_t kChunkElements = 1 << 20;  // of the result, that stay in the cache between the passes over them
constexpr int64_t kChunkRows = 512;          // at least, for the products' sake

bool keeps(const ForwardCall& call) { return call.pre.dim == 2; }

void check(const ForwardCall& call) {
  const char* op = kForward;
  check_factors(op, call.down, call.up, call.scale ? &*call.scale : nullptr, call.activation, call.pre.dtype);
  KF_CHECK(call.x.dim == 2 && call.x.size[1] == call.down.size[1], op, ": x must be (M, K) with K = ",
           call.down.size[1], "; got ", Shape{call.x});
  const int64_t tokens = call.x.size[0], width = call.down.size[0], features = call.up.size[0];
  check_contiguous(op, "y", call.y, tokens, features);
  KF_CHECK(keeps(call) || (call.pre.dim == 1 && call.pre.empty()), op, ": pre must be (", tokens, ", ", width,
           "), or (0) where it is not kept; got ", Shape{call.pre});
  if (keeps(call)) check_contiguous(op, "pre", call.pre, tokens, width);
  if (call.residual) check_shape(op, "residual", *call.residual, tokens, features);
  if (call.down_bias) check_shape(op, "down_bias", *call.down_bias, width, -1);
  if (call.up_bias) check_shape(op, "up_bias", *call.up_bias, features, -1);
  for (const View* output : {&call.y, &call.pre}) {
    const char* name = output == &call.y ? "y" : "pre";
    check_apart(op, name, *output, "x", call.x);
    check_apart(op, name, *output, "down", call.down);
    check_apart(op, name, *output, "up", call.up);
    if (call.residual) check_apart(op, name, *output, "residual", *call.residual);
    if (call.down_bias) check_apart(op, name, *output, "down_bias", *call.down_bias);
    if (call.up_bias) check_apart(op, name, *output, "up_bias", *call.up_bias);
    if (call.scale) check_apart(op, name, *output, "scale_tensor", *call.scale);
  }
  check_apart(op, "y", call.y, "pre", call.pre);
}

// What a forward keeps at hand from one chunk of tokens to the next.
struct Forward {
  const ForwardCall& call;
  DType compute;
  int64_t chunk;
  double scale;  // never 0: then up and its bias are 0 instead
  std::optional<Floats> down_bias, up_bias;
  std::optional<Scratch> down_copy, up_copy, x_copy, pre_copy, hidden_copy, delta_copy;
  View down, up;

  explicit Forward(const ForwardCall& given) : call(given), compute(given.pre.dtype) {
    chunk = std::max(kChunkRows, kChunkElements / call.up.size[0]);
    chunk = std::min(chunk, std::max<int64_t>(1, call.x.size[0]));
    const SplitScale scales = split(scale_of(call.scale_number, call.scale));
    scale = scales.of_product;
    down_bias = bias_of(call.down_bias, compute);
    up_bias = bias_of(call.up_bias, compute, scales.of_operand);
    down = readied(call.down, compute, down_copy, call.down.size[0]);
    up = readied(call.up, compute, up_copy, call.up.size[0], scales.of_operand);
  }

  View scratch(std::optional<Scratch>& place, int64_t rows, int64_t columns) {
    if (!place) place.emplace(compute, chunk, columns);
    return place->rows(rows);
  }

  // act(x · downᵀ + down_bias) of some tokens; the sum is kept where backward needs it.
  View hidden_layer(int64_t first, int64_t rows) {
    const View x = readied(some_rows(call.x, first, rows), compute, x_copy, chunk);
    const bool kept = keeps(call);
    const View pre = kept ? some_rows(call.pre, first, rows) : scratch(pre_copy, rows, down.size[0]);
    const View hidden = kept ? scratch(hidden_copy, rows, down.size[0]) : pre;
    if (down_bias && compute == DType::bf16) {
      // Into the product's rounding, not into a sum of its own.
      add(nullptr, nullptr, down_bias->data(), 1.0, pre);
      gemm(pre, x, transposed(down), 1.0);
      activate(pre, nullptr, false, call.activation, hidden);
    } else {
      gemm(pre, x, transposed(down));
      activate(pre, down_bias ? down_bias->data() : nullptr, kept, call.activation, hidden);
    }
    return hidden;
  }

  // y = residual + scale · (hidden · upᵀ + up_bias) of some tokens.
  void result(const View& hidden, int64_t first, int64_t rows) {
    const View y = some_rows(call.y, first, rows);
    const float* bias = up_bias ? up_bias->data() : nullptr;
    std::optional<View> residual;
    if (call.residual) residual = some_rows(*call.residual, first, rows);
    const bool same = y.dtype == compute;
    if (same && !residual && bias == nullptr) return gemm(y, hidden, transposed(up), 0.0, scale);
    if (same && !residual) {
      add(nullptr, nullptr, bias, 1.0, y);
      return gemm(y, hidden, transposed(up), scale, scale);
    }
    if (same && (compute == DType::f32 || bias == nullptr)) {
      add(&*residual, nullptr, bias, scale, y);
      return gemm(y, hidden, transposed(up), 1.0, scale);
    }
    // In 16 bits the sum with the bias would round y once more: the bias goes into the product's rounding instead.
    const View delta = same ? y : scratch(delta_copy, rows, up.size[0]);
    if (bias != nullptr) add(nullptr, nullptr, bias, 1.0, delta);
    gemm(delta, hidden, transposed(up), bias == nullptr ? 0.0 : 1.0);
    add(residual ? &*residual : nullptr, &delta, nullptr, scale, y);
  }
};

}  // namespace

void forward(const ForwardCall& call) {
  check(call);
  if (call.y.empty()) return;
  Forward forward(call);
  const int64_t tokens = call.x.size[0];
  for (int64_t first = 0; first < tokens; first += forward.chunk) {
    const int64_t rows = std::min(forward.chunk, tokens - first);
    forward.result(forward.hidden_layer(first, rows), first, rows);
  }
}

}  // namespace kronafuse::cpu::bottleneck
