// The passes over rows as launchers call them: on views, in threads.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "common/view.h"
#include "cpu/common/buffer.h"

namespace kronafuse::cpu::bottleneck {

// Scratch of any of the compute dtypes.
class Scratch {
 public:
  Scratch(DType dtype, int64_t rows, int64_t columns);
  const View& view() const { return view_; }
  View rows(int64_t count) const;

 private:
  Floats memory_;
  View view_;
};

// gain · a bias as floats rounded to the compute dtype; nothing where there is none.
std::optional<Floats> bias_of(const std::optional<View>& bias, DType compute, double gain = 1.0);

// number · tensor, rounded to fp32, in which it is applied.
double scale_of(double number, const std::optional<View>& tensor);

// What multiplies an operand before its product, and what multiplies the product. A GEMM never gets a scale of 0: it
// would not read its operands, and a NaN in them would be lost.
struct SplitScale {
  double of_operand, of_product;
};
// Numbers below float's normal ones are 0 to a GEMM where the processor flushes them.
inline bool vanishes(double scale) { return std::abs(scale) < std::numeric_limits<float>::min(); }
inline SplitScale split(double scale) { return vanishes(scale) ? SplitScale{scale, 1.0} : SplitScale{1.0, scale}; }

// The view itself where a GEMM in `compute` reads it and gain is 1, else a copy of gain · view in `scratch`, which is
// made for `rows` rows at once.
View readied(const View& view, DType compute, std::optional<Scratch>& scratch, int64_t rows, double gain = 1.0);

// hidden = act(pre + bias), both (M, H) contiguous in the compute dtype; `keep` writes pre + bias back.
void activate(const View& pre, const float* bias, bool keep, int64_t activation, const View& hidden);

// dpre ⊙= act'(pre); hidden = act(pre) and sums[h] += Σ dpre where they are asked for.
void differentiate(const View& dpre, const View& pre, int64_t activation, const View* hidden, float* sums);

// out = added + scale · (delta + bias) of (M, N) views, each term where it is there; delta may be out.
void add(const View* added, const View* delta, const float* bias, double scale, const View& out);

// out = scale · source.
void convert(const View& source, double scale, const View& out);

}  // namespace kronafuse::cpu::bottleneck
