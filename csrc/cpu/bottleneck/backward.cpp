#include <algorithm>

#include "cpu/bottleneck/bottleneck.h"
#include "cpu/bottleneck/checks.h"
#include "cpu/bottleneck/factor_gradient.h"
#include "cpu/bottleneck/passes.h"
#include "cpu/common/element.h"
#include "cpu/common/gemm.h"
#include "cpu/kron_linear/columns.h"

namespace kronafuse::cpu::bottleneck {
namespace {

constexpr const char* kBackward = "bottleneck_backward";
constexpr int64_t kChunkElements = 1 << 20;  // of dx, that stay in the cache between the passes over them
constexpr int64_t kChunkRows = 512;  // at least, for the products' sake
// Tokens at a time where dy or x has to be copied into the compute dtype first.
constexpr int64_t kCopiedElements = 1 << 21;
// Up to this width, from so many tokens up, a transposed copy of up is faster to multiply by.
constexpr int64_t kTinyWidth = 16, kTinyTokens = 256;

bool needs_dpre(const BackwardCall& call) { return call.dx || call.ddown || call.ddown_bias; }
bool needs_hidden(const BackwardCall& call) { return call.dup || call.dscale; }

void check(const BackwardCall& call) {
  const char* op = kBackward;
  const int64_t width = call.down.dim == 2 ? call.down.size[0] : 0, features = call.up.dim == 2 ? call.up.size[0] : 0;
  check_factors(op, call.down, call.up, call.scale ? &*call.scale : nullptr, call.activation, call.pre.dtype);
  KF_CHECK(call.dy.dim == 2 && call.dy.size[1] == features, op, ": dy must be (M, N) with N = ", features, "; got ",
           Shape{call.dy});
  const int64_t tokens = call.dy.size[0], inner = call.down.size[1];
  if (needs_dpre(call) || needs_hidden(call)) check_contiguous(op, "pre", call.pre, tokens, width);
  if (call.x) check_shape(op, "x", *call.x, tokens, inner);
  KF_CHECK(!call.ddown || call.x, op, ": ddown ", Shape{*call.ddown}, " needs x; got none");
  KF_CHECK(!call.dx || !call.adds_dy || inner == features, op, ": where the residual is x, N must equal K = ", inner,
           "; got ", features);
  if (call.up_bias) check_shape(op, "up_bias", *call.up_bias, features, -1);
  if (call.dx) check_contiguous(op, "dx", *call.dx, tokens, inner);
  if (call.ddown) check_contiguous(op, "ddown", *call.ddown, width, inner);
  if (call.dup) check_contiguous(op, "dup", *call.dup, features, width);
  if (call.ddown_bias) check_shape(op, "ddown_bias", *call.ddown_bias, width, -1);
  if (call.dup_bias) check_shape(op, "dup_bias", *call.dup_bias, features, -1);
  KF_CHECK(!call.dscale || call.dscale->elements() == 1, op, ": dscale must have one element; got ",
           Shape{*call.dscale});
  const std::optional<View>* outputs[] = {&call.dx, &call.ddown, &call.dup, &call.ddown_bias, &call.dup_bias,
                                          &call.dscale};
  const char* names[] = {"dx", "ddown", "dup", "ddown_bias", "dup_bias", "dscale"};
  for (int i = 0; i < 6; ++i) {
    if (!*outputs[i]) continue;
    const View& output = **outputs[i];
    KF_CHECK(distinct_elements(output), op, ": elements of ", names[i], " must not share memory; got strides ",
             Strides{output});
    check_apart(op, names[i], output, "dy", call.dy);
    check_apart(op, names[i], output, "pre", call.pre);
    check_apart(op, names[i], output, "down", call.down);
    check_apart(op, names[i], output, "up", call.up);
    if (call.x) check_apart(op, names[i], output, "x", *call.x);
    if (call.up_bias) check_apart(op, names[i], output, "up_bias", *call.up_bias);
    if (call.scale) check_apart(op, names[i], output, "scale_tensor", *call.scale);
    for (int j = 0; j < i; ++j) {
      if (*outputs[j]) check_apart(op, names[i], output, names[j], **outputs[j]);
    }
  }
}

// What a backward keeps at hand from one chunk of tokens to the next.
struct Backward {
  const BackwardCall& call;
  DType compute;
  int64_t tokens, width, features, inner;
  int64_t chunk;  // tokens at a time: all of them unless dy or x is copied
  double scale;
  bool unscaled;  // gradients of up and its bias at scale 1 first: the scale's own is made of them, and no GEMM gets 0
  std::optional<Scratch> down_copy, up_copy, dy_copy, x_copy, dpre_place, hidden_place, dx_place;
  View down, up;
  std::optional<Floats> down_sums, up_sums;
  std::optional<FactorGradient> ddown, dup;

  explicit Backward(const BackwardCall& given) : call(given), compute(given.pre.dtype) {
    tokens = call.dy.size[0], width = call.down.size[0], features = call.up.size[0], inner = call.down.size[1];
    scale = scale_of(call.scale_number, call.scale);
    unscaled = call.dscale.has_value() || vanishes(scale);
    const auto is_read = [&](const View& view) { return view.dtype == compute && is_gemm_ready(view); };
    const bool copies = !is_read(call.dy) || (call.ddown && !is_read(*call.x));
    chunk = std::max<int64_t>(1, tokens);
    if (copies) chunk = std::min(chunk, std::max(kChunkRows, kCopiedElements / std::max(features, inner)));
    if (call.dx) down = readied(call.down, compute, down_copy, width);
    if (needs_dpre(call)) ready_up();
    if (call.ddown_bias) zero(down_sums, width);
    if (call.dup_bias || call.dscale) zero(up_sums, features);
    if (call.ddown) ddown.emplace(width, inner, tokens, chunk, compute);
    if (call.dup || call.dscale) dup.emplace(features, width, tokens, chunk, compute);
  }

  static void zero(std::optional<Floats>& sums, int64_t count) {
    sums.emplace(count);
    std::fill_n(sums->data(), count, 0.0f);
  }

  void ready_up() {
    const double gain = split(scale).of_operand;
    if (width <= kTinyWidth && tokens >= kTinyTokens && call.up.stride[0] != 1) {
      up_copy.emplace(compute, width, features);
      convert(transposed(call.up), gain, up_copy->view());
      up = transposed(up_copy->view());
    } else {
      up = readied(call.up, compute, up_copy, features, gain);
    }
  }

  void run_chunk(int64_t first, int64_t rows) {
    const bool products = needs_dpre(call) || needs_hidden(call);
    const View raw = some_rows(call.dy, first, rows);
    const View dy = readied(raw, compute, dy_copy, chunk);
    if (up_sums) {
      column_sums(dy, std::nullopt, true, {up_sums->data(), DType::f32, 1, {features, 1, 1, 1}, {1, 0, 0, 0}});
    }
    if (!products) return;
    const View pre = some_rows(call.pre, first, rows);
    std::optional<View> hidden;
    if (needs_hidden(call)) {
      if (!hidden_place) hidden_place.emplace(compute, chunk, width);
      hidden = hidden_place->rows(rows);
    }
    if (needs_dpre(call)) {
      if (!dpre_place) dpre_place.emplace(compute, chunk, width);
      const View dpre = dpre_place->rows(rows);
      gemm(dpre, dy, up, 0.0, split(scale).of_product);
      differentiate(dpre, pre, call.activation, hidden ? &*hidden : nullptr, down_sums ? down_sums->data() : nullptr);
      if (call.dx) into_dx(dpre, raw, first, rows);
      if (ddown) ddown->accumulate(dpre, readied(some_rows(*call.x, first, rows), compute, x_copy, chunk), 1.0);
    } else {
      activate(pre, nullptr, false, call.activation, *hidden);
    }
    if (dup) dup->accumulate(dy, *hidden, unscaled ? 1.0 : scale);
  }

  // dx = dpre · down, plus dy where the residual is x, some rows at a time.
  void into_dx(const View& dpre, const View& dy, int64_t first, int64_t rows) {
    const View dx = some_rows(*call.dx, first, rows);
    if (dx.dtype == compute && !call.adds_dy) return gemm(dx, dpre, down);
    const int64_t step = std::min(rows, std::max(kChunkRows, kChunkElements / inner));
    for (int64_t at = 0; at < rows; at += step) {
      const int64_t count = std::min(step, rows - at);
      const View out = some_rows(dx, at, count), left = some_rows(dpre, at, count), added = some_rows(dy, at, count);
      if (dx.dtype == compute) {
        add(&added, nullptr, nullptr, 1.0, out);
        gemm(out, left, down, 1.0);
        continue;
      }
      if (!dx_place) dx_place.emplace(compute, step, inner);
      const View product = dx_place->rows(count);
      gemm(product, left, down);
      add(call.adds_dy ? &added : nullptr, &product, nullptr, 1.0, out);
    }
  }

  void finish() {
    if (ddown) ddown->store(*call.ddown, 1.0);
    if (call.ddown_bias) store_vector(down_sums->data(), 1.0, *call.ddown_bias);
    if (call.dup_bias) store_vector(up_sums->data(), scale, *call.dup_bias);
    if (call.dscale) {
      double total = dup->dot(call.up, compute);
      for (int64_t n = 0; call.up_bias && n < features; ++n) {
        total += static_cast<double>(up_sums->data()[n]) *
                 rounded_to(compute, load_element(call.up_bias->data, call.up_bias->dtype, n * call.up_bias->stride[0]));
      }
      store_vector(&total, 1.0, *call.dscale);
    }
    if (call.dup) dup->store(*call.dup, unscaled ? scale : 1.0);
  }
};

}  // namespace

void backward(const BackwardCall& call) {
  check(call);
  Backward backward(call);
  for (int64_t first = 0; first < backward.tokens; first += backward.chunk) {
    backward.run_chunk(first, std::min(backward.chunk, backward.tokens - first));
  }
  backward.finish();
}

}  // namespace kronafuse::cpu::bottleneck
