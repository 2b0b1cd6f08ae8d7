#include "cpu/kron_linear/columns.h"

#include <algorithm>

#include "cpu/common/parallel.h"
#include "cpu/kron_linear/checks.h"
#include "cpu/kron_linear/columns_job.h"
#include "cpu/kron_linear/dense.h"

namespace kronafuse::cpu {
namespace {

constexpr int64_t kMostSlices = 32;
constexpr int64_t kSliceElements = 1 << 15;  // of one slice, at least
constexpr int64_t kPartColumns = 4096;       // whose sums stay in the first-level cache

}  // namespace

void column_sums(const View& p, const std::optional<View>& q, bool accumulate, const View& out) {
  check_dim("column_sums", "p", p, 2);
  check_computes("column_sums", "p", p);
  check_dim("column_sums", "out", out, 1);
  if (q) {
    check_dim("column_sums", "q", *q, 2);
    KF_CHECK(q->dtype == p.dtype, "column_sums: q must have p's dtype ", p.dtype, "; got ", q->dtype);
    KF_CHECK(q->size[0] == p.size[0] && q->size[1] == p.size[1], "column_sums: q must have p's shape ", Shape{p},
             "; got ", Shape{*q});
    check_apart("column_sums", "q", *q, out, false);
  }
  KF_CHECK(out.size[0] == p.size[1], "column_sums: out must be (N) = (", p.size[1], "); got ", Shape{out});
  check_output("column_sums", "out", out);
  check_apart("column_sums", "p", p, out, false);
  if (out.empty()) return;
  ColumnsJob job{};
  job.p = operand_of(p);
  job.q = operand_of(q);
  job.is_bf16 = p.dtype == DType::bf16;
  job.tokens = p.size[0];
  job.columns = p.size[1];
  const double elements = static_cast<double>(job.tokens) * static_cast<double>(job.columns);
  const auto enough = static_cast<int64_t>(std::min<double>(elements / kSliceElements, kMostSlices));
  job.slices = std::clamp<int64_t>(enough, 1, std::max<int64_t>(job.tokens, 1));
  job.slice_tokens = (job.tokens + job.slices - 1) / job.slices;
  job.part_columns = std::min(job.columns, kPartColumns);
  job.parts = (job.columns + job.part_columns - 1) / job.part_columns;
  const Floats partial(job.slices * job.columns);
  job.partial = partial.data();
  parallel_for(job.slices * job.parts, 1,
               [&](int64_t begin, int64_t end) { KF_KERNEL(columns_units)(job, begin, end); });
  for (int64_t c = 0; c < job.columns; ++c) {
    const int64_t at = c * out.stride[0];
    float total = accumulate ? load_element(out.data, out.dtype, at) : 0.0f;
    for (int64_t s = 0; s < job.slices; ++s) total += partial.data()[s * job.columns + c];
    store_element(out.data, out.dtype, at, total);
  }
}

}  // namespace kronafuse::cpu
