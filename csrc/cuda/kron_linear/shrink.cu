#include "cuda/kron_linear/shrink.h"

#include "cuda/kron_linear/contraction_kernel.cuh"

namespace kronafuse::cuda {

void contract_k(const ContractionParameters& parameters, DType dtype, Stream stream) {
  contract_with<Neighbours::k>(parameters, dtype, stream);
}

void shrink(const Contraction& call) {
  Contraction named = call;
  named.name = "shrink";
  contract(named);
}

int64_t shrink_workspace(const Contraction& call) {
  Contraction named = call;
  named.name = "shrink_workspace";
  return contraction_workspace(named);
}

}  // namespace kronafuse::cuda
