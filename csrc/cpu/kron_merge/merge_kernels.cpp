#include "cpu/common/vector.h"
#include "cpu/kron_merge/merge_job.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {
namespace {

// to[c] = from[c] + factor · right[c]
template <class T>
KF_INLINE void merge_segment(const T* from, int64_t stride, float factor, const float* right, int64_t columns, T* to) {
  int64_t c = 0;
  if (stride == 1) {
    for (; c + kLanes <= columns; c += kLanes) store(to + c, load(from + c) + broadcast(factor) * load(right + c));
    const int rest = static_cast<int>(columns - c);
    if (rest > 0) store_first(to + c, load_first(from + c, rest) + broadcast(factor) * load_first(right + c, rest), rest);
    return;
  }
  for (; c < columns; ++c) put(to + c, to_float(from[c * stride]) + factor * right[c]);
}

template <class T>
void merge_row(const MergeJob& job, int64_t row) {
  const int64_t first = job.shuffled ? row % job.n1 : row / job.n2;
  const int64_t second = job.shuffled ? row / job.n1 : row % job.n2;
  const T* from = static_cast<const T*>(job.weight.data) + row * job.weight.stride[0];
  T* to = static_cast<T*>(job.out.data) + row * job.out.stride[0];
  const float* right = job.right + second * job.k2;
  for (int64_t k1 = 0; k1 < job.k1; ++k1) {
    const float factor = job.scale * job.left[first * job.k1 + k1];
    const int64_t column = k1 * job.k2;
    merge_segment(from + column * job.weight.stride[1], job.weight.stride[1], factor, right, job.k2, to + column);
  }
}

}  // namespace

void merge_rows(const MergeJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (job.is_bf16) {
      merge_row<bf16>(job, row);
    } else {
      merge_row<float>(job, row);
    }
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
