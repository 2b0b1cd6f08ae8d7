// y = x Wᵀ + bias + base + Σ tails: the GEMM with tails, torch-free.
#pragma once

#include <cstdint>
#include <optional>

#include "common/view.h"

namespace kronafuse::cuda {

// Two operands of one dense tail: y += T Lᵀ.
struct DenseTail {
  View t;   // (M, width)
  View up;  // (N, width), rows in y's order of features
};

// I ⊗ B: feature (n1, n2) gets out_scale · Σ_r inner[m, n1, r] up[n2, r].
struct BlockTail {
  View inner;                     // (M, N1, R)
  View up;                        // (N2, R), of y's dtype or fp32
  std::optional<View> out_scale;  // (N,), in y's order of features
};

// A ⊗ I: feature (n1, n2) gets out_scale · Σ_j left[n1, j] inner[m, j, n2], by multiply-adds.
struct MixTail {
  View inner;                     // (M, J, N2)
  View left;                      // (N1, J), of y's dtype or fp32
  std::optional<View> out_scale;  // (N,), in y's order of features
};

constexpr int kDenseTails = 4;

// x, weight, base, T, L and y are of one dtype, fp16 or bf16, in any strides; bias has it too or is fp32.
struct LinearArguments {
  std::optional<View> x;       // (M, K); with weight or not at all
  std::optional<View> weight;  // (N, K)
  std::optional<View> bias;    // (N,)
  std::optional<View> base;    // (M, N); may be y itself, element on element
  DenseTail dense[kDenseTails];
  int dense_count = 0;
  std::optional<BlockTail> block;
  std::optional<MixTail> mix;
  // Feature (n1, n2) of the block or mix tail is n2·N1 + n1 of y, weight, bias, base and L, instead of n1·N2 + n2.
  bool shuffled = false;
  View y;  // (M, N)
  void* stream = nullptr;
};

// config: kChoose for the form and tile that the tables choose, kChoosePlain for the plain form's; 0 .. for a row of
// configs.h; kHopperConfigs + i for row i of configs_sm90a.h, an error where that form cannot serve.
constexpr int kChoose = -1, kChoosePlain = -2, kHopperConfigs = 100;
void linear(const LinearArguments& arguments, int config);

// Checks what every form relies on: shapes, dtypes, sizes that the index types hold.
void check_linear(const LinearArguments& arguments);

// The Hopper form where this library has it: linear_sm90a.cu puts its entry here when the library is loaded.
// It gets checked arguments and a row of its own table (-1: it chooses), and returns whether it served the call.
using LinearForm = bool (*)(const LinearArguments& arguments, int config);
LinearForm& hopper_linear();

}  // namespace kronafuse::cuda
