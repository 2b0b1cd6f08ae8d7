#include "cuda/kron_linear/contraction.h"

#include <algorithm>

#include "cuda/kron_linear/contraction_parameters.h"

namespace kronafuse::cuda {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 30;

bool serves(DType dtype, DType compute) { return dtype == compute || dtype == DType::f32; }

void check_factor(const Contraction& c, const View& factor) {
  const View& x = c.x;
  KF_CHECK(factor.dim == 2 && factor.size[1] == x.size[2], c.name, ": a factor must be (O, I) with I = ", x.size[2],
           ", what x ", Shape{x}, " has of it; got ", Shape{factor});
  KF_CHECK(serves(factor.dtype, x.dtype), c.name, ": a factor must be of x's dtype, ", x.dtype, ", or float32; got ",
           factor.dtype);
}

void check_out(const Contraction& c, const ContractionFactor& each) {
  const View &x = c.x, &factor = each.factor, &out = each.out;
  KF_CHECK(!each.scale_tensor || each.scale_tensor->elements() == 1, c.name,
           ": a scale tensor must have one element; got ", Shape{*each.scale_tensor});
  KF_CHECK(out.dim == 3 && out.size[0] == x.size[0] && out.size[1] == x.size[1] && out.size[2] == factor.size[0],
           c.name, ": an output must be (", x.size[0], ", ", x.size[1], ", ", factor.size[0], ") as (M, rows, O); got ",
           Shape{out});
  KF_CHECK(out.dtype == x.dtype, c.name, ": an output must be of x's dtype, ", x.dtype, "; got ", out.dtype);
  KF_CHECK(distinct_elements(out), c.name, ": an output's elements must not overlap; got strides ", Strides{out});
}

// What the plan and the pointers into shared memory rely on.
void check_product(const Contraction& c) {
  const View& x = c.x;
  KF_CHECK(x.dim == 3, c.name, ": x must have 3 dimensions; got ", Shape{x});
  KF_CHECK(x.dtype == DType::f16 || x.dtype == DType::bf16, c.name, ": x must be float16 or bfloat16; got ", x.dtype);
  const auto count = static_cast<int64_t>(c.factors.size());
  KF_CHECK(count >= 1 && count <= kContractionFactors, c.name, ": 1 to ", kContractionFactors,
           " factors share a read of x; got ", count);
  int64_t columns = 0;
  for (const ContractionFactor& each : c.factors) {
    check_factor(c, each.factor);
    columns += each.factor.size[0] + 7;
  }
  KF_CHECK(x.size[0] <= kMostRows && x.size[1] <= kMostRows && x.size[0] * x.size[1] <= kMostRows, c.name,
           ": rows of x, ", x.size[0], " · ", x.size[1], ", must be at most ", kMostRows);
  KF_CHECK(x.size[2] <= kMostRows && columns <= kMostRows, c.name, ": x's last size and the factors' rows together, ",
           x.size[2], " and ", columns, ", must be at most ", kMostRows);
}

void check_rest(const Contraction& c) {
  const View& x = c.x;
  const size_t count = c.factors.size();
  for (const ContractionFactor& each : c.factors) check_out(c, each);
  if (c.in_scale) {
    KF_CHECK(c.in_scale->dim == 2 && c.in_scale->size[0] == x.size[1] && c.in_scale->size[1] == x.size[2], c.name,
             ": in_scale must be as x without its tokens, (", x.size[1], ", ", x.size[2], "); got ",
             Shape{*c.in_scale});
  }
  KF_CHECK(count == 1 || (!c.base && !c.out_scale), c.name, ": base and out_scale are for one factor; got ", count);
  const int64_t width = c.factors[0].factor.size[0];
  if (c.base) {
    KF_CHECK(c.base->dim == 3 && c.base->size[0] == x.size[0] && c.base->size[1] == x.size[1] &&
                 c.base->size[2] == width,
             c.name, ": base must be as the output, (", x.size[0], ", ", x.size[1], ", ", width, "); got ",
             Shape{*c.base});
    KF_CHECK(c.base->dtype == x.dtype, c.name, ": base must be of x's dtype, ", x.dtype, "; got ", c.base->dtype);
  }
  if (c.out_scale) {
    KF_CHECK(c.out_scale->dim == 2 && c.out_scale->size[0] == x.size[1] && c.out_scale->size[1] == width, c.name,
             ": out_scale must be as the output without its tokens, (", x.size[1], ", ", width, "); got ",
             Shape{*c.out_scale});
  }
}

// Whether (m, g) is one dimension: every row as far from the one before.
bool rows_merge(const View& view) {
  return view.size[0] == 1 || view.size[1] == 1 || view.stride[0] == view.size[1] * view.stride[1];
}

int64_t merged_stride(const View& view) {
  if (view.size[0] * view.size[1] == 1) return 0;
  return view.size[1] == 1 ? view.stride[0] : view.stride[1];
}

// The rows of all arrays of a call: M groups of G, or one run of M·G.
struct Rows {
  bool merged;
  int64_t rows, group;

  explicit Rows(const Contraction& c) : rows(c.x.size[0] * c.x.size[1]), group(c.x.size[1]) {
    merged = !c.in_scale && !c.out_scale && rows_merge(c.x) && (!c.base || rows_merge(*c.base));
    for (const ContractionFactor& each : c.factors) merged = merged && (each.out.dim == 0 || rows_merge(each.out));
  }

  int64_t stride_m(const View& view) const { return merged || view.size[0] == 1 ? 0 : view.stride[0]; }
  int64_t stride_g(const View& view) const {
    return merged ? merged_stride(view) : view.size[1] == 1 ? 0 : view.stride[1];
  }

  // The longest run of neighbours, 8 at most, that lies together and aligned wherever one begins.
  // whole: whether the dimension must be made of whole runs; else the last one may be cut.
  int run(const View& view, Neighbours neighbours, bool whole) const {
    const int64_t third = view.size[2] == 1 ? 0 : view.stride[2], size = merged ? rows : group;
    const bool along_k = neighbours == Neighbours::k;
    const bool together = along_k ? view.size[2] == 1 || view.stride[2] == 1 : size == 1 || stride_g(view) == 1;
    if (!together) return 1;
    for (int length = 8; length > 1; length /= 2) {
      const bool begins = reinterpret_cast<uintptr_t>(view.data) % (2 * length) == 0 && stride_m(view) % length == 0 &&
                          (along_k ? stride_g(view) : third) % length == 0;
      // A run that reaches into the next group would be torn.
      const int64_t limit = along_k ? view.size[2] : size;
      const bool fits = limit % length == 0 || (!whole && (along_k || merged));
      if (begins && fits) return length;
    }
    return 1;
  }
};

struct Layout {
  Neighbours neighbours;
  int piece;
};

Layout layout_of(const Contraction& c, const Rows& rows) {
  const int along_k = rows.run(c.x, Neighbours::k, true), along_rows = rows.run(c.x, Neighbours::rows, true);
  if (along_k == 1 && along_rows == 1) {
    const bool together = c.x.stride[2] != 1 && rows.stride_g(c.x) == 1;
    return {together ? Neighbours::rows : Neighbours::k, 1};
  }
  return along_rows > along_k ? Layout{Neighbours::rows, along_rows} : Layout{Neighbours::k, along_k};
}

int64_t padded_columns(const Contraction& c) {
  int64_t columns = 0;
  for (const ContractionFactor& each : c.factors) columns += (each.factor.size[0] + 7) / 8 * 8;
  return columns;
}

int64_t total_columns(const Contraction& c) {
  int64_t columns = 0;
  for (const ContractionFactor& each : c.factors) columns += each.factor.size[0];
  return columns;
}

ContractionPlan plan_of(const Contraction& c, const Rows& rows, bool splitting) {
  return plan_contraction(layout_of(c, rows).neighbours, rows.rows, padded_columns(c), c.x.size[2], splitting,
                          device_info());
}

ContractionTarget target_of(const View& view, const Rows& rows) {
  return {view.data, rows.stride_m(view), rows.stride_g(view), view.stride[2]};
}

ContractionScales scales_of(const std::optional<View>& view) {
  if (!view) return {nullptr, DType::f32, 0, 0};
  return {view->data, view->dtype, view->stride[0], view->stride[1]};
}

FactorReading reading_of(const View& factor) {
  const int64_t vector = 16 / size_of(factor.dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(factor.data) % 16 == 0;
  if (aligned && factor.size[1] % 8 == 0 && factor.stride[1] == 1 && factor.stride[0] % vector == 0) {
    return factor.dtype == DType::f32 ? FactorReading::along_k : FactorReading::copied;
  }
  const bool columns = factor.size[0] % 8 == 0 && factor.stride[0] == 1 && factor.stride[1] % vector == 0;
  return aligned && columns ? FactorReading::along_o : FactorReading::single;
}

ContractionSlot slot_of(const Contraction& c, const ContractionFactor& each, const Rows& rows, Neighbours neighbours) {
  ContractionSlot slot{};
  slot.factor = each.factor.data;
  slot.stride_o = each.factor.stride[0];
  slot.stride_k = each.factor.stride[1];
  slot.is_float32 = each.factor.dtype == DType::f32;
  slot.reading = reading_of(each.factor);
  slot.width = static_cast<int>(each.factor.size[0]);
  slot.scale = static_cast<float>(each.scale);
  slot.scale_tensor = each.scale_tensor ? each.scale_tensor->data : nullptr;
  slot.scale_dtype = each.scale_tensor ? each.scale_tensor->dtype : DType::f32;
  slot.out = target_of(each.out, rows);
  slot.run = rows.run(each.out, neighbours, false);
  if (c.base) slot.run = std::min(slot.run, rows.run(*c.base, neighbours, false));
  return slot;
}

ContractionParameters parameters_of(const Contraction& c, const Rows& rows, const Layout& layout) {
  ContractionParameters p{};
  p.x = c.x.data;
  p.stride_m = rows.stride_m(c.x);
  p.stride_g = rows.stride_g(c.x);
  p.stride_k = c.x.size[2] == 1 ? 1 : c.x.stride[2];
  p.rows = static_cast<int>(rows.rows);
  if (!rows.merged) p.group = ContractionGroup(static_cast<int>(rows.group));
  p.k = static_cast<int>(c.x.size[2]);
  p.piece = layout.piece;
  p.in_scale = scales_of(c.in_scale);
  p.out_scale = scales_of(c.out_scale);
  if (c.base) p.base = target_of(*c.base, rows);
  for (const ContractionFactor& each : c.factors) {
    ContractionSlot slot = slot_of(c, each, rows, layout.neighbours);
    slot.tile = p.column_tiles;
    slot.column = p.columns;
    p.column_tiles += (slot.width + 7) / 8;
    p.columns += slot.width;
    p.slots[p.count++] = slot;
  }
  return p;
}

}  // namespace

int64_t contraction_workspace(const Contraction& c) {
  check_product(c);
  const Rows rows(c);
  const int64_t columns = total_columns(c);
  if (rows.rows == 0 || columns == 0) return 0;
  const int64_t splits = plan_of(c, rows, true).splits;
  return splits == 1 ? 0 : splits * rows.rows * columns;
}

void contract(const Contraction& c) {
  check_product(c);
  check_rest(c);
  const Rows rows(c);
  if (rows.rows == 0 || total_columns(c) == 0) return;
  const Layout layout = layout_of(c, rows);
  ContractionParameters p = parameters_of(c, rows, layout);
  p.plan = plan_of(c, rows, c.workspace && !c.workspace->empty());
  if (p.plan.splits > 1) {
    const int64_t needed = int64_t{p.plan.splits} * p.rows * p.columns;
    const View& workspace = *c.workspace;
    KF_CHECK(workspace.dtype == DType::f32 && workspace.dim == 1 && workspace.stride[0] == 1 &&
                 workspace.size[0] >= needed,
             c.name, ": workspace must be ", needed, " contiguous elements of float32; got ", Shape{workspace}, " of ",
             workspace.dtype);
    p.partial = static_cast<float*>(workspace.data);
  }
  (layout.neighbours == Neighbours::k ? contract_k : contract_rows)(p, c.x.dtype, c.stream);
  if (p.plan.splits > 1) sum_splits(p, c.x.dtype, c.stream);
}

}  // namespace kronafuse::cuda
