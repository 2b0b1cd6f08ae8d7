// The left factor beside the identity: first products A first, second products B first, and what goes into y with them.
#pragma once

#include <optional>

#include "common/view.h"

namespace kronafuse::cpu {

// y (M, O, C) = [y +] bias + base + scale · out_scale ⊙ A (in_scale ⊙ p[m]), each element rounded once.
//
// p:         (M, I, C)   absent: no product
// left:      (O, I)      A, in any dtype; rounded to y's; absent: the identity, O = I
// in_scale:  (I, C), out_scale (O, C), bias (O, C), all in any dtype
// base:      (M, O, C)   may be y itself
//
// p, base and y are float32 or bfloat16, of one dtype, with any strides; y overlaps neither itself nor p.
void mix(const std::optional<View>& p, const std::optional<View>& left, const std::optional<View>& in_scale,
         const std::optional<View>& out_scale, const std::optional<View>& bias, const std::optional<View>& base,
         double scale, bool accumulate, const View& y);

}  // namespace kronafuse::cpu
