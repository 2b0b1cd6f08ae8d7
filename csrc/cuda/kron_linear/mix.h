// T[i] = s[i] · A[i] (in_scale ⊙ x) per token: the map A ⊗ I of one or several adapters, torch-free.
#pragma once

#include "cuda/kron_linear/contraction.h"

namespace kronafuse::cuda {

// x (M, I1, I2), A (O1, I1), T and base (M, O1, I2), in_scale (I1, I2), out_scale (O1, I2), any strides.
void mix(const Contraction& call);
int64_t mix_workspace(const Contraction& call);

}  // namespace kronafuse::cuda
