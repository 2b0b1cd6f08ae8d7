// Σ over tokens and groups of (p_scale ⊙ p)ᵀ q, in slices of tokens: what a kernel of each level is given.
#pragma once

#include "cpu/common/level.h"
#include "cpu/common/operand.h"

namespace kronafuse::cpu {

struct ReduceJob {
  Operand p, q;  // (M, G, P), (M, G, Q)
  bool is_bf16;
  bool by_dots;  // whether bf16 pairs are multiplied at once
  // Whether neighbours in memory are groups: then sums are inner products of rows, else sums of outer products.
  bool by_groups;
  int64_t tokens, groups, height, width;  // M, G, P, Q
  const float* p_scale;                   // (G, P), by groups (P, G); null where absent
  int panel_rows;                         // 4 or 8
  int64_t slices, slice_tokens;
  int64_t parts, part_width;  // of the columns of q
  int64_t block;              // rows (m, g) of one step, by groups tokens
  float* partial;             // [slices][padded P][padded Q]
  int64_t padded_height, padded_width;
};

// Floats of scratch that one thread needs.
KF_DECLARE_KERNEL(int64_t, reduce_scratch, const ReduceJob&)
// Units [begin, end) of slices · parts: the sums of one slice, of one part of the columns.
KF_DECLARE_KERNEL(void, reduce_units, const ReduceJob&, int64_t begin, int64_t end, float* scratch)

// Columns that one pair of vectors holds: widths of parts are multiples of it.
KF_DECLARE_KERNEL(int64_t, reduce_pair)

}  // namespace kronafuse::cpu
