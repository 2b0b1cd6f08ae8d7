#include "cuda/kron_linear/mix.h"

#include "cuda/kron_linear/contraction_kernel.cuh"

namespace kronafuse::cuda {
namespace {

void exchange_last(View& view, int dim) {
  if (view.dim != dim) return;  // an error that the checks will tell
  std::swap(view.size[dim - 2], view.size[dim - 1]);
  std::swap(view.stride[dim - 2], view.stride[dim - 1]);
}

// Column i2 of a token's X is a row that is contracted over i1.
Contraction over_columns(Contraction call, const char* name) {
  call.name = name;
  exchange_last(call.x, 3);
  if (call.in_scale) exchange_last(*call.in_scale, 2);
  if (call.base) exchange_last(*call.base, 3);
  if (call.out_scale) exchange_last(*call.out_scale, 2);
  for (ContractionFactor& each : call.factors) exchange_last(each.out, 3);
  return call;
}

}  // namespace

void contract_rows(const ContractionParameters& parameters, DType dtype, Stream stream) {
  contract_with<Neighbours::rows>(parameters, dtype, stream);
}

void mix(const Contraction& call) { contract(over_columns(call, "mix (shapes with the last two sizes exchanged)")); }

int64_t mix_workspace(const Contraction& call) {
  return contraction_workspace(over_columns(call, "mix_workspace (shapes with the last two sizes exchanged)"));
}

}  // namespace kronafuse::cuda
