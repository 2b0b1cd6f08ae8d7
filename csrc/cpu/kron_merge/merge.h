// A new weight with the delta folded in.
#pragma once

#include "common/view.h"

namespace kronafuse::cpu {

// out (N, K) = weight + scale · (A ⊗ B), formed in fp32 and rounded once.
//
// weight:   (N, K)    float32 or bfloat16, any strides
// left:     (N1, K1)  A, right (N2, K2) B, in any dtype
// shuffled: row n2·N1 + n1 takes what row n1·N2 + n2 of A ⊗ B holds
// out:      (N, K)    of weight's dtype, neighbours in a row side by side; shares no memory with the others
void merge(const View& weight, const View& left, const View& right, double scale, bool shuffled, const View& out);

}  // namespace kronafuse::cpu
