#include "cpu/common/vector.h"
#include "cpu/kron_linear/columns_job.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {
namespace {

// sums[c] += p[c] · q[c] of one token.
template <class T>
KF_INLINE void add_token(const T* p, const T* q, int64_t columns, float* sums) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    Vector value = load(p + c);
    if (q != nullptr) value *= load(q + c);
    store(sums + c, load(sums + c) + value);
  }
  for (; c < columns; ++c) sums[c] += to_float(p[c]) * (q == nullptr ? 1.0f : to_float(q[c]));
}

template <class T>
void columns_unit(const ColumnsJob& job, int64_t unit) {
  const int64_t slice = unit / job.parts, column = unit % job.parts * job.part_columns;
  const int64_t left = job.columns - column, columns = left < job.part_columns ? left : job.part_columns;
  const int64_t begin = slice * job.slice_tokens, last = begin + job.slice_tokens;
  const int64_t end = last < job.tokens ? last : job.tokens;
  float* sums = job.partial + slice * job.columns + column;
  for (int64_t c = 0; c < columns; ++c) sums[c] = 0;
  const bool plain = job.p.stride[1] == 1 && (job.q.data == nullptr || job.q.stride[1] == 1);
  for (int64_t m = begin; m < end; ++m) {
    const T* p = static_cast<const T*>(job.p.data) + m * job.p.stride[0] + column * job.p.stride[1];
    const T* q = job.q.data == nullptr
                     ? nullptr
                     : static_cast<const T*>(job.q.data) + m * job.q.stride[0] + column * job.q.stride[1];
    if (plain) {
      add_token(p, q, columns, sums);
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) {
      const float other = q == nullptr ? 1.0f : to_float(q[c * job.q.stride[1]]);
      sums[c] += to_float(p[c * job.p.stride[1]]) * other;
    }
  }
}

}  // namespace

void columns_units(const ColumnsJob& job, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (job.is_bf16) {
      columns_unit<bf16>(job, unit);
    } else {
      columns_unit<float>(job, unit);
    }
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
