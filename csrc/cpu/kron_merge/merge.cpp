#include "cpu/kron_merge/merge.h"

#include <algorithm>

#include "cpu/common/parallel.h"
#include "cpu/kron_linear/checks.h"
#include "cpu/kron_linear/dense.h"
#include "cpu/kron_merge/merge_job.h"

namespace kronafuse::cpu {
namespace {

constexpr int64_t kGrainElements = 1 << 15;

}  // namespace

void merge(const View& weight, const View& left, const View& right, double scale, bool shuffled, const View& out) {
  check_dim("merge", "weight", weight, 2);
  check_computes("merge", "weight", weight);
  check_dim("merge", "left", left, 2);
  check_dim("merge", "right", right, 2);
  check_dim("merge", "out", out, 2);
  // Divided, not multiplied: sizes of expanded views may have any product.
  const auto splits = [](int64_t size, int64_t first, int64_t second) {
    return first == 0 || second == 0 ? size == 0 : size % first == 0 && size / first == second;
  };
  KF_CHECK(splits(weight.size[0], left.size[0], right.size[0]) && splits(weight.size[1], left.size[1], right.size[1]),
           "merge: weight must be (N1·N2, K1·K2); got ", Shape{weight}, " for left (N1, K1) = ", Shape{left},
           " and right (N2, K2) = ", Shape{right});
  KF_CHECK(out.dtype == weight.dtype, "merge: out must have weight's dtype ", weight.dtype, "; got ", out.dtype);
  KF_CHECK(out.size[0] == weight.size[0] && out.size[1] == weight.size[1], "merge: out must have weight's shape ",
           Shape{weight}, "; got ", Shape{out});
  KF_CHECK(out.size[1] <= 1 || out.stride[1] == 1, "merge: out's columns must lie side by side; got strides ",
           Strides{out});
  check_output("merge", "out", out);
  for (const View* input : {&weight, &left, &right}) check_apart("merge", "an input", *input, out, false);
  if (out.empty()) return;
  const auto a = dense(left, DType::f32), b = dense(right, DType::f32);
  MergeJob job{};
  job.weight = operand_of(weight);
  job.out = operand_of(out);
  job.is_bf16 = weight.dtype == DType::bf16;
  job.shuffled = shuffled;
  job.n1 = left.size[0];
  job.k1 = left.size[1];
  job.n2 = right.size[0];
  job.k2 = right.size[1];
  job.left = data_of(a);
  job.right = data_of(b);
  job.scale = static_cast<float>(scale);
  parallel_for(out.size[0], std::max<int64_t>(1, kGrainElements / out.size[1]),
               [&](int64_t begin, int64_t end) { KF_KERNEL(merge_rows)(job, begin, end); });
}

}  // namespace kronafuse::cpu
