// Between the entry, which plans, and the files of instances, which hold the kernels.
#pragma once

#include "cuda/common/stream.h"
#include "cuda/kron_linear/sm90a/problem.cuh"

namespace kronafuse::cuda {

// Form: an index of kHopperForms; defined by explicit instantiation in linear_<tile>_sm90a.cu.
template <class T, int Form, bool Transposed>
void launch_linear_sm90a(const HopperProblem& problem, Stream stream);

}  // namespace kronafuse::cuda
