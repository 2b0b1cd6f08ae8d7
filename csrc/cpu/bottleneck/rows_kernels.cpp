#include "cpu/bottleneck/rows_job.h"

#include "cpu/bottleneck/functions.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {
namespace {

// body(at, count) over [0, length), whole vectors first.
template <class Body>
KF_INLINE void over_vectors(int64_t length, const Body& body) {
  int64_t at = 0;
  for (; at + kLanes <= length; at += kLanes) body(at, kLanes);
  if (at < length) body(at, static_cast<int>(length - at));
}

template <class T>
KF_INLINE Vector load_some(const T* from, int count) {
  return count == kLanes ? load(from) : load_first(from, count);
}

template <class T>
KF_INLINE void store_some(T* to, Vector value, int count) {
  if (count == kLanes) {
    store(to, value);
  } else {
    store_first(to, value, count);
  }
}

template <class T, int ACTIVATION>
void activate_as(const ActivateJob& job, int64_t begin, int64_t end) {
  for (int64_t span = begin; span < end; ++span) {
    const int64_t first = span * job.rows.span, left = job.rows.elements - first;
    const T* pre = static_cast<const T*>(job.pre) + first;
    T* kept = job.kept == nullptr ? nullptr : static_cast<T*>(job.kept) + first;
    T* hidden = static_cast<T*>(job.hidden) + first;
    over_vectors(left < job.rows.span ? left : job.rows.span, [&](int64_t at, int count) {
      Vector value = load_some(pre + at, count);
      if (job.bias != nullptr) value += load_some(job.bias + at, count);
      if (kept != nullptr) store_some(kept + at, value, count);
      store_some(hidden + at, activate<ACTIVATION>(value), count);
    });
  }
}

template <class T, int ACTIVATION>
void differentiate_as(const DifferentiateJob& job, int64_t begin, int64_t end) {
  const int64_t span_size = job.rows.span;
  for (int64_t block = begin; block < end; ++block) {
    float* sums = job.partial == nullptr ? nullptr : job.partial + block * span_size;
    for (int64_t at = 0; sums != nullptr && at < span_size; ++at) sums[at] = 0;
    const int64_t first_span = block * job.block_spans;
    for (int64_t span = first_span; span < first_span + job.block_spans; ++span) {
      const int64_t first = span * span_size, left = job.rows.elements - first;
      if (left <= 0) break;
      const T* pre = static_cast<const T*>(job.pre) + first;
      T* dpre = static_cast<T*>(job.dpre) + first;
      T* hidden = job.hidden == nullptr ? nullptr : static_cast<T*>(job.hidden) + first;
      over_vectors(left < span_size ? left : span_size, [&](int64_t at, int count) {
        Vector slope;
        const Vector value = activate<ACTIVATION>(load_some(pre + at, count), slope);
        if (hidden != nullptr) store_some(hidden + at, value, count);
        const Vector gradient = load_some(dpre + at, count) * slope;
        store_some(dpre + at, gradient, count);
        if (sums != nullptr) store_some(sums + at, load_some(sums + at, count) + gradient, count);
      });
    }
  }
}

template <class Added, class Delta, class Out>
void add_as(const AddJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Added* added =
        job.added == nullptr ? nullptr : static_cast<const Added*>(job.added) + row * job.stride_added;
    const Delta* delta =
        job.delta == nullptr ? nullptr : static_cast<const Delta*>(job.delta) + row * job.stride_delta;
    Out* out = static_cast<Out*>(job.out) + row * job.stride_out;
    over_vectors(job.columns, [&](int64_t at, int count) {
      Vector value = delta == nullptr ? Vector{} : load_some(delta + at, count);
      if (job.bias != nullptr) value += load_some(job.bias + at, count);
      value *= job.scale;
      if (added != nullptr) value += load_some(added + at, count);
      store_some(out + at, value, count);
    });
  }
}

template <class Added, class Delta>
void add_into(const AddJob& job, int64_t begin, int64_t end) {
  job.out_is_bf16 ? add_as<Added, Delta, bf16>(job, begin, end) : add_as<Added, Delta, float>(job, begin, end);
}

template <class Added>
void add_delta(const AddJob& job, int64_t begin, int64_t end) {
  job.delta_is_bf16 ? add_into<Added, bf16>(job, begin, end) : add_into<Added, float>(job, begin, end);
}

template <template <class, int> class Run, class T, class Job>
KF_INLINE void with_activation(const Job& job, int64_t begin, int64_t end) {
  switch (job.rows.activation) {
    case RELU: return Run<T, RELU>::run(job, begin, end);
    case SIGMOID: return Run<T, SIGMOID>::run(job, begin, end);
    case SILU: return Run<T, SILU>::run(job, begin, end);
    case GELU: return Run<T, GELU>::run(job, begin, end);
    default: return Run<T, IDENTITY>::run(job, begin, end);
  }
}

template <class T, int ACTIVATION>
struct Activate {
  static void run(const ActivateJob& job, int64_t begin, int64_t end) { activate_as<T, ACTIVATION>(job, begin, end); }
};

template <class T, int ACTIVATION>
struct Differentiate {
  static void run(const DifferentiateJob& job, int64_t begin, int64_t end) {
    differentiate_as<T, ACTIVATION>(job, begin, end);
  }
};

}  // namespace

void activate_spans(const ActivateJob& job, int64_t begin, int64_t end) {
  job.rows.is_bf16 ? with_activation<Activate, bf16>(job, begin, end)
                   : with_activation<Activate, float>(job, begin, end);
}

void differentiate_blocks(const DifferentiateJob& job, int64_t begin, int64_t end) {
  job.rows.is_bf16 ? with_activation<Differentiate, bf16>(job, begin, end)
                   : with_activation<Differentiate, float>(job, begin, end);
}

void add_rows(const AddJob& job, int64_t begin, int64_t end) {
  job.added_is_bf16 ? add_delta<bf16>(job, begin, end) : add_delta<float>(job, begin, end);
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
