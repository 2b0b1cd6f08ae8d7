// The gradient of a factor, leftᵀ right over tokens, from one product or from one for each chunk of tokens.
#pragma once

#include <optional>

#include "common/view.h"
#include "cpu/bottleneck/passes.h"

namespace kronafuse::cpu::bottleneck {

class FactorGradient {
 public:
  // (rows, columns) of `tokens`, of which `chunk` come at a time, in products of the compute dtype.
  FactorGradient(int64_t rows, int64_t columns, int64_t tokens, int64_t chunk, DType compute);

  // += scale · leftᵀ (rows, tokens) right (tokens, columns).
  void accumulate(const View& left, const View& right, double scale);

  // out (rows, columns) = scale · the sum, rounded once.
  void store(const View& out, double scale) const;

  // Σ of the products with a factor's elements, as the compute dtype holds them.
  double dot(const View& factor, DType compute) const;

 private:
  bool transposed_;        // the sum is held as (columns, rows)
  bool started_ = false;
  Scratch product_;
  std::optional<Scratch> sum_;  // in float32, of several products in 16 bits
  View held() const;
};

// A vector or a scalar into a tensor of any dtype and stride.
void store_vector(const float* values, double scale, const View& out);
void store_vector(const double* values, double scale, const View& out);

}  // namespace kronafuse::cpu::bottleneck
