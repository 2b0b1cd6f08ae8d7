// Factor gradients: one deterministic sum over tokens and groups.
#pragma once

#include <optional>

#include "common/view.h"

namespace kronafuse::cpu {

// out (P, Q) = [out +] scale · Σ_{m,g} (p_scale[g] ⊙ p[m, g])ᵀ q[m, g], in fp32, rounded once.
//
// p:       (M, G, P)   float32 or bfloat16, any strides
// q:       (M, G, Q)   of p's dtype
// p_scale: (G, P)      in any dtype, rounded to p's
// out:     (P, Q)      in any dtype, any strides; shares no memory with the others
//
// The slices that are added up depend on the sizes alone: the same result for any number of threads.
void reduce(const View& p, const View& q, const std::optional<View>& p_scale, double scale, bool accumulate,
            const View& out);

}  // namespace kronafuse::cpu
