// T[i] = s[i] · (in_scale ⊙ x) F[i]ᵀ over rows of x, from one read of x: what shrink and mix are, torch-free.
//
// Rows are (m, g) of a view x (M, G, K), k is contracted. Neighbours in memory are values of k (I ⊗ B: shrink) or
// values of g (A ⊗ I: mix); a kernel each, which differ in how a tile of x lies in shared memory.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/view.h"
#include "cuda/common/stream.h"

namespace kronafuse::cuda {

constexpr int kContractionFactors = 8;

struct ContractionFactor {
  View factor;                       // (O, K), of x's dtype or fp32
  double scale = 1.0;
  std::optional<View> scale_tensor;  // 0-d: multiplies scale
  View out;                          // (M, G, O), of x's dtype
};

struct Contraction {
  const char* name = "";           // of the operator, for messages; shrink and mix set it
  View x;                          // (M, G, K), fp16 or bf16
  std::optional<View> in_scale;    // (G, K)
  std::vector<ContractionFactor> factors;
  // With one factor: out = base + out_scale ⊙ T. base may be out itself, element on element.
  std::optional<View> base;        // (M, G, O), of x's dtype
  std::optional<View> out_scale;   // (G, O)
  std::optional<View> workspace;   // fp32; as many elements as contraction_workspace says or none
  Stream stream = nullptr;
};

// Splits the work over k as well where `workspace` is given; its sums are taken in a fixed order.
void contract(const Contraction& contraction);

// Elements of fp32 that `contract` can use; 0 where it splits nothing. Looks at x and the factors alone.
int64_t contraction_workspace(const Contraction& contraction);

}  // namespace kronafuse::cuda
