#include "cpu/kron_linear/reduce.h"

#include <algorithm>
#include <utility>

#include "cpu/common/parallel.h"
#include "cpu/kron_linear/checks.h"
#include "cpu/kron_linear/dense.h"
#include "cpu/kron_linear/reduce_job.h"

namespace kronafuse::cpu {
namespace {

constexpr int64_t kMostSlices = 16;
constexpr int64_t kSliceOperations = 1 << 21;   // of one slice, at least
constexpr int64_t kSliceRows = 512;             // the same: fewer cost more to add up than to sum
constexpr int64_t kPartialFloats = 1 << 21;     // of all slices' sums, at most
constexpr int64_t kPartFloats = 1 << 16;        // of one unit's sums: half a second-level cache
constexpr int64_t kBlockFloats = 1 << 16;       // of the rows that one step packs
constexpr int64_t kGroupFloats = 1 << 16;       // of the rows that one step lays side by side
constexpr int64_t kMostBlock = 192;
constexpr int64_t kLeastGroups = 12;            // fewer neighbours would leave most of a vector empty

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

void check(const View& p, const View& q, const std::optional<View>& p_scale, const View& out) {
  check_dim("reduce", "p", p, 3);
  check_dim("reduce", "q", q, 3);
  check_dim("reduce", "out", out, 2);
  check_computes("reduce", "p", p);
  KF_CHECK(q.dtype == p.dtype, "reduce: q must have p's dtype ", p.dtype, "; got ", q.dtype);
  KF_CHECK(p.size[0] == q.size[0] && p.size[1] == q.size[1],
           "reduce: p (M, G, P) and q (M, G, Q) must have one M and one G; got ", Shape{p}, " and ", Shape{q});
  KF_CHECK(out.size[0] == p.size[2] && out.size[1] == q.size[2], "reduce: out must be (P, Q) = (", p.size[2], ", ",
           q.size[2], "); got ", Shape{out});
  check_output("reduce", "out", out);
  check_apart("reduce", "p", p, out, false);
  check_apart("reduce", "q", q, out, false);
  check_table("reduce", "p_scale", p_scale, p.size[1], p.size[2], out);
}

// Whether rows of groups are what lies together in memory: runs of tokens and groups side by side.
bool neighbours_are_groups(const View& p, const View& q) {
  return p.size[1] >= kLeastGroups && p.stride[1] == 1 && q.stride[1] == 1 && (p.stride[2] != 1 || q.stride[2] != 1);
}

// How the work is cut, by sizes alone: slices of tokens, parts of the columns, rows of one step.
void cut(ReduceJob& job) {
  const int64_t pair = KF_KERNEL(reduce_pair)();
  job.padded_height = rounded_up(job.height, 8);
  job.padded_width = rounded_up(job.width, 32);
  const int64_t whole = job.padded_height * job.padded_width;
  const double operations = static_cast<double>(whole) * static_cast<double>(job.groups) * job.tokens;
  const auto most = static_cast<double>(std::min(kMostSlices, kPartialFloats / whole));
  const double rows = static_cast<double>(job.groups) * job.tokens;
  const auto enough = static_cast<int64_t>(std::min({operations / kSliceOperations, rows / kSliceRows, most}));
  job.slices = std::clamp<int64_t>(enough, 1, std::max<int64_t>(job.tokens, 1));
  job.slice_tokens = (job.tokens + job.slices - 1) / job.slices;
  job.slices = job.slice_tokens == 0 ? 1 : (job.tokens + job.slice_tokens - 1) / job.slice_tokens;
  job.part_width = std::max(pair, kPartFloats / job.padded_height / pair * pair);
  job.part_width = std::min(job.part_width, rounded_up(job.width, pair));
  job.parts = (job.width + job.part_width - 1) / job.part_width;
  const int64_t row = job.padded_height + rounded_up(job.part_width, 32);
  if (job.by_groups) {
    const int64_t token = (rounded_up(job.height, 4) + rounded_up(job.part_width, 4)) * job.groups;
    job.block = std::clamp<int64_t>(kGroupFloats / token, 1, std::max<int64_t>(1, job.slice_tokens));
  } else {
    job.block = std::clamp<int64_t>(kBlockFloats / row, 16, kMostBlock);
  }
}

// out[i, j] = [out[i, j] +] scale · Σ over the slices, in their order.
void add_up(const ReduceJob& job, float scale, bool swapped, bool accumulate, const View& out) {
  const int64_t slice = job.padded_height * job.padded_width;
  const int64_t rows = std::max<int64_t>(1, 65536 / (job.width * job.slices));
  parallel_for(job.height, rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* total = job.partial + i * job.padded_width;
      for (int64_t s = 1; s < job.slices; ++s) {
        const float* sums = total + s * slice;
        for (int64_t j = 0; j < job.width; ++j) total[j] += sums[j];
      }
      for (int64_t j = 0; j < job.width; ++j) {
        const int64_t at = (swapped ? j : i) * out.stride[0] + (swapped ? i : j) * out.stride[1];
        const float before = accumulate ? load_element(out.data, out.dtype, at) : 0.0f;
        store_element(out.data, out.dtype, at, before + scale * total[j]);
      }
    }
  });
}

// p_scale as (G, P), or (P, G) where rows are groups.
std::optional<Floats> scales_of(std::optional<View> p_scale, bool by_groups, DType compute) {
  if (p_scale && by_groups) {
    std::swap(p_scale->size[0], p_scale->size[1]);
    std::swap(p_scale->stride[0], p_scale->stride[1]);
  }
  return dense(p_scale, compute);
}

}  // namespace

void reduce(const View& p, const View& q, const std::optional<View>& p_scale, double scale, bool accumulate,
            const View& out) {
  check(p, q, p_scale, out);
  if (out.empty()) return;
  // Columns are vectors: the wider side, unless only p can be scaled.
  const bool swapped = !p_scale && p.size[2] > q.size[2];
  const View &left = swapped ? q : p, &right = swapped ? p : q;
  ReduceJob job{};
  job.p = operand_of(left);
  job.q = operand_of(right);
  job.is_bf16 = p.dtype == DType::bf16;
  job.by_dots = job.is_bf16 && !p_scale && has_bf16_dots();
  job.by_groups = neighbours_are_groups(left, right);
  job.tokens = p.size[0];
  job.groups = std::max<int64_t>(p.size[1], 1);
  if (p.size[1] == 0) job.tokens = 0;
  job.height = left.size[2];
  job.width = right.size[2];
  job.panel_rows = level() == Level::avx512 && job.height > 4 ? 8 : 4;
  cut(job);
  const auto scales = scales_of(p_scale, job.by_groups, p.dtype);
  job.p_scale = data_of(scales);
  const Floats partial(job.slices * job.padded_height * job.padded_width);
  job.partial = partial.data();
  const int64_t scratch = KF_KERNEL(reduce_scratch)(job);
  parallel_for(job.slices * job.parts, 1, [&](int64_t begin, int64_t end) {
    const Floats memory(scratch);
    KF_KERNEL(reduce_units)(job, begin, end, memory.data());
  });
  add_up(job, static_cast<float>(scale), swapped, accumulate, out);
}

}  // namespace kronafuse::cpu
