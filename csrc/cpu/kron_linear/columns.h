// Sums over tokens, column by column: the gradients of bias and row scale.
#pragma once

#include <optional>

#include "common/view.h"

namespace kronafuse::cpu {

// out (N) = [out +] Σ_m p[m] ⊙ q[m], in fp32; without q Σ_m p[m].
//
// p, q: (M, N)   float32 or bfloat16, of one dtype, any strides
// out:  (N)      in any dtype; shares no memory with the others
//
// The slices that are added up depend on the sizes alone.
void column_sums(const View& p, const std::optional<View>& q, bool accumulate, const View& out);

}  // namespace kronafuse::cpu
