// Passes over rows around the bottleneck's products: what a kernel of each level is given.
#pragma once

#include <cstdint>

#include "cpu/common/level.h"

namespace kronafuse::cpu {

// The hidden layer's rows one after another, taken `span` elements at a time: a whole number of rows, so that narrow
// layers too fill vectors.
struct HiddenRows {
  int64_t elements;  // M · H
  int64_t span;
  int activation;
  bool is_bf16;
};

// hidden = act(pre + bias); pre + bias is written back where it is kept.
struct ActivateJob {
  HiddenRows rows;
  const void* pre;
  void* kept;         // null where pre + bias is not kept; may be pre
  const float* bias;  // `span` of them, repeated row by row; null for none
  void* hidden;       // may be pre
};

// dpre = dhidden ⊙ act'(pre), in place, and hidden = act(pre) where it is asked for.
struct DifferentiateJob {
  HiddenRows rows;
  const void* pre;
  void* dpre;
  void* hidden;          // null for none
  float* partial;        // [blocks][span] sums of dpre over the spans of a block; null for none
  int64_t block_spans;   // spans of a block
};

// out = added + scale · (delta + bias), each of added, delta and bias where it is there. Elements of a row lie together.
struct AddJob {
  const void* added;
  int64_t stride_added;
  bool added_is_bf16;
  const void* delta;  // may be out
  int64_t stride_delta;
  bool delta_is_bf16;
  const float* bias;
  float scale;
  void* out;
  int64_t stride_out;
  bool out_is_bf16;
  int64_t columns;
};

// Spans [begin, end) of the hidden rows.
KF_DECLARE_KERNEL(void, activate_spans, const ActivateJob&, int64_t begin, int64_t end)
// Blocks [begin, end) of spans.
KF_DECLARE_KERNEL(void, differentiate_blocks, const DifferentiateJob&, int64_t begin, int64_t end)
// Rows [begin, end).
KF_DECLARE_KERNEL(void, add_rows, const AddJob&, int64_t begin, int64_t end)

}  // namespace kronafuse::cpu
