// y = x Wᵀ + bias + base + Σ tails on Hopper's TMA and wgmma.
#pragma once

#include "cuda/kron_linear/linear.h"

namespace kronafuse::cuda {

// config: a row of configs_sm90a.h, or -1 for the row that the cost model chooses. False, and nothing is written,
// where this form cannot serve: operands that TMA cannot read (a feature stride other than 1, rows off 16 bytes), W
// and L of different orientation, mix tails, a block tail with out_scale, an fp32 factor or shuffled, a bias of a
// third dtype, no products at all, another device.
bool linear_sm90a(const LinearArguments& arguments, int config);

}  // namespace kronafuse::cuda
