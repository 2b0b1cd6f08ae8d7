#include "cpu/bottleneck/factor_gradient.h"

#include "cpu/common/element.h"
#include "cpu/common/gemm.h"

namespace kronafuse::cpu::bottleneck {
namespace {

// Up to this width, from so many tokens up, the gradient of a tall factor is faster as the transpose of a wide one's.
constexpr int64_t kNarrow = 64, kNarrowTokens = 256;

}  // namespace

FactorGradient::FactorGradient(int64_t rows, int64_t columns, int64_t tokens, int64_t chunk, DType compute)
    : transposed_(columns <= kNarrow && rows > columns && tokens >= kNarrowTokens),
      product_(compute, transposed_ ? columns : rows, transposed_ ? rows : columns) {
  if (compute != DType::f32 && chunk < tokens) sum_.emplace(DType::f32, product_.view().size[0], product_.view().size[1]);
}

void FactorGradient::accumulate(const View& left, const View& right, double scale) {
  const View& a = transposed_ ? right : left;
  const View& b = transposed_ ? left : right;
  const bool adds = started_ && !sum_;
  gemm(product_.view(), transposed(a), b, adds ? 1.0 : 0.0, scale);
  if (sum_) add(started_ ? &sum_->view() : nullptr, &product_.view(), nullptr, 1.0, sum_->view());
  started_ = true;
}

View FactorGradient::held() const {
  const View& view = sum_ ? sum_->view() : product_.view();
  return transposed_ ? transposed(view) : view;
}

void FactorGradient::store(const View& out, double scale) const {
  if (!started_) return add(nullptr, nullptr, nullptr, 0.0, out);
  convert(held(), scale, out);
}

double FactorGradient::dot(const View& factor, DType compute) const {
  if (!started_) return 0.0;
  const View sum = held();
  double total = 0.0;
  for (int64_t r = 0; r < factor.size[0]; ++r) {
    for (int64_t c = 0; c < factor.size[1]; ++c) {
      const int64_t at = r * sum.stride[0] + c * sum.stride[1];
      const float value = load_element(factor.data, factor.dtype, r * factor.stride[0] + c * factor.stride[1]);
      total += static_cast<double>(load_element(sum.data, sum.dtype, at)) * rounded_to(compute, value);
    }
  }
  return total;
}

void store_vector(const double* values, double scale, const View& out) {
  for (int64_t i = 0; i < out.elements(); ++i) {
    const int64_t at = out.dim == 0 ? 0 : i * out.stride[0];
    if (out.dtype == DType::f64) {
      static_cast<double*>(out.data)[at] = values[i] * scale;
    } else {
      store_element(out.data, out.dtype, at, static_cast<float>(values[i] * scale));
    }
  }
}

void store_vector(const float* values, double scale, const View& out) {
  for (int64_t i = 0; i < out.elements(); ++i) {
    const double value = values[i];
    store_vector(&value, scale, {static_cast<char*>(out.data) + i * out.stride[0] * size_of(out.dtype), out.dtype, 0});
  }
}

}  // namespace kronafuse::cpu::bottleneck
