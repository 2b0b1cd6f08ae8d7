// y = [y +] bias + base + scale · out_scale ⊙ A (in_scale ⊙ p): what a kernel of each level is given.
#pragma once

#include "cpu/common/level.h"
#include "cpu/common/operand.h"

namespace kronafuse::cpu {

struct MixJob {
  Operand y, p, base;  // (M, O, C), (M, I, C), (M, O, C); data null where absent
  bool is_bf16;
  bool by_dots;  // whether bf16 pairs are multiplied at once: panels then hold pairs, [O / panel_rows][I / 2][panel_rows]
  int64_t tokens, out_rows, in_rows, columns;  // M, O, I, C
  const float* panels;                         // A as [O / panel_rows][I][panel_rows]; null for the identity
  int panel_rows;                              // 4 or 8
  const float *in_scale, *out_scale, *bias;    // dense, (I, C), (O, C), (O, C); null where absent
  float scale;
  bool accumulate;
  // Tables of the flat forms, by the smaller of O and I: A repeated over the columns, [.][O · C] or [.][I · C], where
  // neighbours in y or in p are a whole token; null for the tiles.
  const float *spread, *fold;
  int64_t flat_length;  // of a row of the table, padded to the widest vector
  int64_t token_block, column_block;  // of one unit of work; token_block is 1 unless a unit has all columns

  int64_t column_blocks, units;
};

// Floats of scratch that one thread needs.
KF_DECLARE_KERNEL(int64_t, mix_scratch, const MixJob&)
// Units [begin, end), each of which writes its own elements of y.
KF_DECLARE_KERNEL(void, mix_units, const MixJob&, int64_t begin, int64_t end, float* scratch)

// The same for the flat forms.
KF_DECLARE_KERNEL(int64_t, flat_mix_scratch, const MixJob&)
KF_DECLARE_KERNEL(void, flat_mix_units, const MixJob&, int64_t begin, int64_t end, float* scratch)

}  // namespace kronafuse::cpu
