#include "cpu/kron_linear/mix.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/parallel.h"
#include "cpu/kron_linear/checks.h"
#include "cpu/kron_linear/dense.h"
#include "cpu/kron_linear/mix_job.h"

namespace kronafuse::cpu {
namespace {

constexpr int64_t kScratchFloats = 8192;  // of p in one unit: what the first-level cache holds
constexpr int64_t kMostColumns = 512;
constexpr int64_t kEnoughColumns = 64;    // of one token: more than one side by side gain nothing
constexpr int64_t kGrainOperations = 1 << 16;
constexpr int64_t kMostShortSide = 8;    // of A in the flat forms, whose sums and patterns stay near
constexpr int64_t kTableFloats = 1 << 15;
constexpr int64_t kFlatTokens = 32;       // fewer do not pay for the table

void check(const std::optional<View>& p, const std::optional<View>& left, const std::optional<View>& in_scale,
           const std::optional<View>& out_scale, const std::optional<View>& bias, const std::optional<View>& base,
           const View& y) {
  check_dim("mix", "y", y, 3);
  check_computes("mix", "y", y);
  check_output("mix", "y", y);
  const int64_t tokens = y.size[0], rows = y.size[1], columns = y.size[2];
  KF_CHECK(p || !left, "mix: left (O, I) multiplies p (M, I, C); got left ", Shape{*left}, " and no p");
  KF_CHECK(p || !in_scale, "mix: in_scale (I, C) multiplies p (M, I, C); got in_scale ", Shape{*in_scale}, " and no p");
  int64_t in_rows = rows;
  if (p) {
    check_dim("mix", "p", *p, 3);
    KF_CHECK(p->dtype == y.dtype, "mix: p must have y's dtype ", y.dtype, "; got ", p->dtype);
    in_rows = p->size[1];
    KF_CHECK(p->size[0] == tokens && p->size[2] == columns && (left || in_rows == rows),
             "mix: p must be (M, I, C) with y's M = ", tokens, " and C = ", columns,
             left ? "" : ", and I = O without a left factor", "; got ", Shape{*p}, " for y ", Shape{y});
    check_apart("mix", "p", *p, y, !left);
  }
  check_table("mix", "left", left, rows, in_rows, y);
  check_table("mix", "in_scale", in_scale, in_rows, columns, y);
  check_table("mix", "out_scale", out_scale, rows, columns, y);
  check_table("mix", "bias", bias, rows, columns, y);
  if (base) {
    check_dim("mix", "base", *base, 3);
    KF_CHECK(base->dtype == y.dtype, "mix: base must have y's dtype ", y.dtype, "; got ", base->dtype);
    KF_CHECK(base->size[0] == tokens && base->size[1] == rows && base->size[2] == columns,
             "mix: base must have y's shape ", Shape{y}, "; got ", Shape{*base});
    check_apart("mix", "base", *base, y, true);
  }
}

// A as [O / rows][I][rows], rounded to the compute dtype, the last panel filled up with zeros.
Floats panels_of(const View& left, int rows, DType compute) {
  const int64_t out_rows = left.size[0], in_rows = left.size[1];
  const int64_t count = (out_rows + rows - 1) / rows;
  Floats panels(count * rows * in_rows);
  float* to = panels.data();
  for (int64_t panel = 0; panel < count; ++panel) {
    for (int64_t i = 0; i < in_rows; ++i) {
      for (int64_t o = panel * rows; o < (panel + 1) * rows; ++o) {
        const int64_t at = o * left.stride[0] + i * left.stride[1];
        *to++ = o < out_rows ? rounded_to(compute, load_element(left.data, left.dtype, at)) : 0.0f;
      }
    }
  }
  return panels;
}

// The same as pairs of bf16: [O / rows][I / 2][rows] words, an odd last row paired with zeros.
Floats paired_panels_of(const View& left, int rows) {
  const int64_t out_rows = left.size[0], in_rows = left.size[1], pairs = (in_rows + 1) / 2;
  const int64_t count = (out_rows + rows - 1) / rows;
  Floats panels(count * rows * pairs);
  auto* to = reinterpret_cast<uint32_t*>(panels.data());
  const auto half = [&](int64_t o, int64_t i) -> uint32_t {
    if (o >= out_rows || i >= in_rows) return 0;
    return float_to_bf16(load_element(left.data, left.dtype, o * left.stride[0] + i * left.stride[1]));
  };
  for (int64_t panel = 0; panel < count; ++panel) {
    for (int64_t k = 0; k < pairs; ++k) {
      for (int64_t o = panel * rows; o < (panel + 1) * rows; ++o) *to++ = half(o, 2 * k) | (half(o, 2 * k + 1) << 16);
    }
  }
  return panels;
}

// How y is cut: whole tokens side by side until a unit has enough columns, or one token's columns in parts.
void cut(MixJob& job) {
  const int64_t depth = job.panels == nullptr ? 1 : std::max<int64_t>(job.in_rows, 8);
  const int64_t wanted = std::clamp<int64_t>(kScratchFloats / depth / 32 * 32, 32, kMostColumns);
  if (job.columns >= std::min(wanted, kEnoughColumns)) {
    const int64_t parts = (job.columns + wanted - 1) / wanted;
    job.token_block = 1;
    job.column_block = std::min(job.columns, ((job.columns + parts - 1) / parts + 31) / 32 * 32);
  } else {
    job.token_block = std::max<int64_t>(1, wanted / job.columns);
    job.column_block = job.columns;
  }
  job.column_blocks = (job.columns + job.column_block - 1) / job.column_block;
  job.units = (job.tokens + job.token_block - 1) / job.token_block * job.column_blocks;
}

// Whether (M, R, C) lies as whole tokens of R · C neighbours.
bool is_flat(const std::optional<View>& view) {
  return view && view->stride[2] == 1 && (view->size[1] == 1 || view->stride[1] == view->size[2]);
}

// A beside the identity as a table of whole rows: A[o, i] · in_scale[i, c] at (i, (o, c)), or at (o, (i, c)).
Floats flat_table(const MixJob& job, const View& left, bool spread, DType compute) {
  const int64_t rows = spread ? job.in_rows : job.out_rows, others = spread ? job.out_rows : job.in_rows;
  Floats table(rows * job.flat_length);
  for (int64_t row = 0; row < rows; ++row) {
    float* to = table.data() + row * job.flat_length;
    std::fill(to, to + job.flat_length, 0.0f);
    for (int64_t other = 0; other < others; ++other) {
      const int64_t o = spread ? other : row, i = spread ? row : other;
      const int64_t at = o * left.stride[0] + i * left.stride[1];
      const float value = rounded_to(compute, load_element(left.data, left.dtype, at));
      for (int64_t c = 0; c < job.columns; ++c) {
        const bool scaled = !spread && job.in_scale != nullptr;
        *to++ = scaled ? value * job.in_scale[i * job.columns + c] : value;
      }
    }
  }
  return table;
}

// The flat form that serves, if any: narrow columns, one short side of A, the other side's tokens whole.
std::optional<Floats> flat_form(MixJob& job, const std::optional<View>& p, const View& left,
                                const std::optional<View>& base, const View& y, DType compute) {
  if (job.columns >= kEnoughColumns || job.tokens < kFlatTokens) return std::nullopt;
  const bool y_is_flat = is_flat(y) && (!base || is_flat(base));
  const bool spread = job.in_rows <= job.out_rows;
  if (std::min(job.in_rows, job.out_rows) > kMostShortSide || !(spread ? y_is_flat : is_flat(p))) return std::nullopt;
  const int64_t width = std::max(job.in_rows, job.out_rows) * job.columns;
  job.flat_length = (width + 15) / 16 * 16;
  if (job.flat_length * std::min(job.in_rows, job.out_rows) > kTableFloats) return std::nullopt;
  auto table = std::make_optional(flat_table(job, left, spread, compute));
  (spread ? job.spread : job.fold) = table->data();
  job.token_block = 16;
  job.column_block = job.columns;
  job.column_blocks = 1;
  job.units = (job.tokens + job.token_block - 1) / job.token_block;
  return table;
}

}  // namespace

void mix(const std::optional<View>& p, const std::optional<View>& left, const std::optional<View>& in_scale,
         const std::optional<View>& out_scale, const std::optional<View>& bias, const std::optional<View>& base,
         double scale, bool accumulate, const View& y) {
  check(p, left, in_scale, out_scale, bias, base, y);
  if (y.empty()) return;
  const DType compute = y.dtype;
  const auto in_scales = dense(in_scale, compute), out_scales = dense(out_scale, compute);
  const auto biases = dense(bias, compute);
  MixJob job{};
  job.y = operand_of(y);
  job.p = operand_of(p);
  job.base = operand_of(base);
  job.is_bf16 = compute == DType::bf16;
  job.tokens = y.size[0];
  job.out_rows = y.size[1];
  job.in_rows = p ? p->size[1] : 0;
  job.columns = y.size[2];
  job.panel_rows = level() == Level::avx512 && job.out_rows > 4 ? 8 : 4;
  // A sum over no rows is 0: nothing is multiplied then.
  if (job.in_rows == 0) job.p.data = nullptr;
  job.in_scale = data_of(in_scales);
  job.out_scale = data_of(out_scales);
  job.bias = data_of(biases);
  job.scale = static_cast<float>(scale);
  job.accumulate = accumulate;
  const bool multiplies = left && job.p.data != nullptr;
  std::optional<Floats> table, panels;
  if (multiplies) table = flat_form(job, p, *left, base, y, compute);
  if (!table) {
    job.by_dots = job.is_bf16 && !in_scale && has_bf16_dots();
    if (multiplies && job.by_dots) panels.emplace(paired_panels_of(*left, job.panel_rows));
    if (multiplies && !job.by_dots) panels.emplace(panels_of(*left, job.panel_rows, compute));
    job.panels = data_of(panels);
    cut(job);
  }
  const int64_t depth = multiplies ? job.in_rows + 2 : 2;
  const int64_t work = job.token_block * job.column_block * job.out_rows * depth;
  const int64_t scratch = table ? KF_KERNEL(flat_mix_scratch)(job) : KF_KERNEL(mix_scratch)(job);
  parallel_for(job.units, std::max<int64_t>(1, kGrainOperations / work), [&](int64_t begin, int64_t end) {
    const Floats memory(scratch);
    if (table) {
      KF_KERNEL(flat_mix_units)(job, begin, end, memory.data());
    } else {
      KF_KERNEL(mix_units)(job, begin, end, memory.data());
    }
  });
}

}  // namespace kronafuse::cpu
