// T[i] = s[i] · (in_scale ⊙ x) D[i]ᵀ: the map I ⊗ D of one or several adapters from one read of x, torch-free.
#pragma once

#include "cuda/kron_linear/contraction.h"

namespace kronafuse::cuda {

// x (M, I1, I2), D (O, I2), T (M, I1, O), in_scale (I1, I2), any strides.
void shrink(const Contraction& call);
int64_t shrink_workspace(const Contraction& call);

}  // namespace kronafuse::cuda
