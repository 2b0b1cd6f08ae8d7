#include "cpu/bottleneck/passes.h"

#include <algorithm>
#include <cstring>

#include "cpu/bottleneck/rows_job.h"
#include "cpu/common/element.h"
#include "cpu/common/gemm.h"
#include "cpu/common/parallel.h"

namespace kronafuse::cpu::bottleneck {
namespace {

constexpr int64_t kGrainElements = 1 << 14;
constexpr int64_t kCopyElements = 1 << 16;
constexpr int64_t kSpanElements = 256;    // of narrow rows taken together, at least
constexpr int64_t kBlockElements = 1 << 14;  // of one partial sum

HiddenRows hidden_rows(const View& view, int64_t activation) {
  const int64_t width = view.size[1];
  return {view.elements(), width * ((kSpanElements + width - 1) / width), static_cast<int>(activation),
          view.dtype == DType::bf16};
}

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// That hold rows · columns elements: sizes of two expanded factors may have any product.
int64_t floats_of(DType dtype, int64_t rows, int64_t columns) {
  int64_t size_bytes = 0;
  KF_CHECK(!__builtin_mul_overflow(rows, columns * size_of(dtype), &size_bytes), "bottleneck: a buffer of ", rows, " by ",
           columns, " elements: sizes out of range");
  return blocks_of(size_bytes, 4);
}

bool is_plain(const View& view) {
  return (view.dtype == DType::f32 || view.dtype == DType::bf16) && (view.stride[1] == 1 || view.size[1] == 1);
}

double load_wide(const View& view, int64_t at) {
  return view.dtype == DType::f64 ? static_cast<const double*>(view.data)[at]
                                  : load_element(view.data, view.dtype, at);
}

void add_elements(const View* added, const View* delta, const float* bias, double scale, const View& out,
                  int64_t row) {
  for (int64_t c = 0; c < out.size[1]; ++c) {
    double value = delta == nullptr ? 0.0 : load_wide(*delta, row * delta->stride[0] + c * delta->stride[1]);
    if (bias != nullptr) value += bias[c];
    value *= scale;
    if (added != nullptr) value += load_wide(*added, row * added->stride[0] + c * added->stride[1]);
    const int64_t at = row * out.stride[0] + c * out.stride[1];
    if (out.dtype == DType::f64) {
      static_cast<double*>(out.data)[at] = value;
    } else {
      store_element(out.data, out.dtype, at, static_cast<float>(value));
    }
  }
}

struct Half {
  uint16_t bits;
};
float value_of(float value) { return value; }
float value_of(Half value) { return bf16_to_float(value.bits); }
void put(float* to, float value) { *to = value; }
void put(Half* to, float value) { to->bits = float_to_bf16(value); }

// Some rows at a time, read along the dimension whose elements lie together: a transposed source stays in the cache.
template <class From, class To>
void convert_rows(const View& source, float scale, const View& out, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = 16;
  for (int64_t first = begin; first < end; first += kTogether) {
    const int64_t last = std::min(end, first + kTogether);
    for (int64_t c = 0; c < out.size[1]; ++c) {
      const From* from = static_cast<const From*>(source.data) + c * source.stride[1];
      To* to = static_cast<To*>(out.data) + c * out.stride[1];
      for (int64_t row = first; row < last; ++row) {
        put(to + row * out.stride[0], scale * value_of(from[row * source.stride[0]]));
      }
    }
  }
}

using ConvertRows = void (*)(const View&, float, const View&, int64_t, int64_t);

// For the dtypes of products and factors, whatever the strides; null for others.
ConvertRows convert_rows_of(DType from, DType to) {
  if (from == DType::f32 && to == DType::f32) return &convert_rows<float, float>;
  if (from == DType::f32 && to == DType::bf16) return &convert_rows<float, Half>;
  if (from == DType::bf16 && to == DType::f32) return &convert_rows<Half, float>;
  if (from == DType::bf16 && to == DType::bf16) return &convert_rows<Half, Half>;
  return nullptr;
}

// out's rows are those of `source`, or all its first one where `stride` is 0: bytes as they are.
void copy_rows(const void* source, int64_t stride, const View& out) {
  const int64_t element = size_of(out.dtype);
  parallel_for(out.size[0], std::max<int64_t>(1, kCopyElements / out.size[1]), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(static_cast<char*>(out.data) + row * out.stride[0] * element,
                  static_cast<const char*>(source) + row * stride * element, out.size[1] * element);
    }
  });
}

}  // namespace

Scratch::Scratch(DType dtype, int64_t rows, int64_t columns)
    : memory_(floats_of(dtype, rows, columns)), view_(matrix(memory_.data(), dtype, rows, columns)) {}

View Scratch::rows(int64_t count) const { return some_rows(view_, 0, count); }

std::optional<Floats> bias_of(const std::optional<View>& bias, DType compute, double gain) {
  if (!bias) return std::nullopt;
  std::optional<Floats> out(std::in_place, bias->size[0]);
  const float factor = static_cast<float>(gain);
  for (int64_t i = 0; i < bias->size[0]; ++i) {
    out->data()[i] = factor * rounded_to(compute, load_element(bias->data, bias->dtype, i * bias->stride[0]));
  }
  return out;
}

double scale_of(double number, const std::optional<View>& tensor) {
  return static_cast<float>(tensor ? number * load_wide(*tensor, 0) : number);
}

View readied(const View& view, DType compute, std::optional<Scratch>& scratch, int64_t rows, double gain) {
  if (gain == 1.0 && view.dtype == compute && is_gemm_ready(view)) return view;
  if (!scratch) scratch.emplace(compute, rows, view.size[1]);
  const View copy = scratch->rows(view.size[0]);
  convert(view, gain, copy);
  return copy;
}

void activate(const View& pre, const float* bias, bool keep, int64_t activation, const View& hidden) {
  if (pre.empty()) return;
  ActivateJob job{};
  job.rows = hidden_rows(pre, activation);
  job.pre = pre.data;
  job.hidden = hidden.data;
  std::optional<Floats> repeated;
  if (bias != nullptr) {
    repeated.emplace(job.rows.span);
    for (int64_t i = 0; i < job.rows.span; ++i) repeated->data()[i] = bias[i % pre.size[1]];
    job.bias = repeated->data();
    if (keep) job.kept = pre.data;
  }
  parallel_for(blocks_of(job.rows.elements, job.rows.span), std::max<int64_t>(1, kGrainElements / job.rows.span),
               [&](int64_t begin, int64_t end) { KF_KERNEL(activate_spans)(job, begin, end); });
}

void differentiate(const View& dpre, const View& pre, int64_t activation, const View* hidden, float* sums) {
  if (pre.empty()) return;
  DifferentiateJob job{};
  job.rows = hidden_rows(pre, activation);
  job.pre = pre.data;
  job.dpre = dpre.data;
  job.hidden = hidden == nullptr ? nullptr : hidden->data;
  // What a block sums depends on the shape alone, and so does the order of the sums.
  job.block_spans = std::max<int64_t>(1, kBlockElements / job.rows.span);
  const int64_t span = job.rows.span, blocks = blocks_of(blocks_of(job.rows.elements, span), job.block_spans);
  std::optional<Floats> partial;
  if (sums != nullptr) job.partial = partial.emplace(blocks * span).data();
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) { KF_KERNEL(differentiate_blocks)(job, begin, end); });
  if (sums == nullptr) return;
  const int64_t width = pre.size[1];
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < span; i += width) {
      const float* from = partial->data() + block * span + i;
      for (int64_t h = 0; h < width; ++h) sums[h] += from[h];
    }
  }
}

void add(const View* added, const View* delta, const float* bias, double scale, const View& out) {
  if (out.empty()) return;
  const bool plain = is_plain(out) && (added == nullptr || is_plain(*added)) && (delta == nullptr || is_plain(*delta));
  const int64_t grain = std::max<int64_t>(1, kGrainElements / out.size[1]);
  if (!plain) {
    parallel_for(out.size[0], grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) add_elements(added, delta, bias, scale, out, row);
    });
    return;
  }
  if (added != nullptr && delta == nullptr && bias == nullptr && added->dtype == out.dtype) {
    return copy_rows(added->data, added->stride[0], out);
  }
  if (added == nullptr && delta == nullptr && out.size[0] > 1) {
    // One row, and the others after it.
    const View first = some_rows(out, 0, 1);
    add(nullptr, nullptr, bias, scale, first);
    return copy_rows(out.data, 0, some_rows(out, 1, out.size[0] - 1));
  }
  AddJob job{};
  if (added != nullptr) {
    job.added = added->data;
    job.stride_added = added->stride[0];
    job.added_is_bf16 = added->dtype == DType::bf16;
  }
  if (delta != nullptr) {
    job.delta = delta->data;
    job.stride_delta = delta->stride[0];
    job.delta_is_bf16 = delta->dtype == DType::bf16;
  }
  job.bias = bias;
  job.scale = static_cast<float>(scale);
  job.out = out.data;
  job.stride_out = out.stride[0];
  job.out_is_bf16 = out.dtype == DType::bf16;
  job.columns = out.size[1];
  parallel_for(out.size[0], grain, [&](int64_t begin, int64_t end) { KF_KERNEL(add_rows)(job, begin, end); });
}

void convert(const View& source, double scale, const View& out) {
  const ConvertRows run = convert_rows_of(source.dtype, out.dtype);
  if (run == nullptr || (is_plain(source) && is_plain(out))) return add(nullptr, &source, nullptr, scale, out);
  if (out.empty()) return;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / out.size[1]);
  parallel_for(out.size[0], grain, [&](int64_t begin, int64_t end) {
    run(source, static_cast<float>(scale), out, begin, end);
  });
}

}  // namespace kronafuse::cpu::bottleneck
