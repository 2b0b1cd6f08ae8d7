// What the host hands to the Hopper kernel: operand pairs of one K loop, and where y goes.
#pragma once

#include "cuda/common/tma.cuh"
#include "cuda/kron_linear/configs_sm90a.h"
#include "cuda/kron_linear/linear.h"
#include "cuda/kron_linear/sm90a/schedule.cuh"

namespace kronafuse::cuda {

// One pair of operands, `width` long in K: [x | W], [T | L], or the block tail. Of the latter's a (M, N1, R) and b
// (N2, R) a tile takes `passes` blocks n1; where such a block ends inside the tile, b's rows beyond it are outside
// the tensor and read as zero.
struct Segment {
  TensorMap a;  // (M, 1, width) or (M, N1, R)
  TensorMap b;
  int width;
  int passes;
  int period;  // features of a block: N2, or N where there is one
};

// How a tile of W or L lies in a stage: rows of 64 k, or where N is contiguous boxes of a swizzle's span of n times
// 64 k. A 160-wide tile has no whole number of 64-column boxes, and one wgmma knows one swizzle: its boxes are 32
// columns wide.
constexpr Swizzle hopper_b_swizzle(HopperForm form, bool transposed) {
  return transposed && form.tile_n % 64 ? Swizzle::b64 : Swizzle::b128;
}

// The first and the other dimension of the box in which one block of a cluster fetches B.
constexpr int hopper_b_box_inner(HopperForm form, bool transposed) {
  return transposed ? span_of(hopper_b_swizzle(form, transposed)) / 2 : kHopperBlockK;
}

constexpr int hopper_b_box_outer(HopperForm form, bool transposed, int cluster) {
  return (transposed ? kHopperBlockK : form.tile_n) / cluster;
}

constexpr int kSegments = 1 + kDenseTails + 1;

struct HopperProblem {
  Segment segments[kSegments];
  TensorMap y;            // boxes of 64 x 64
  TensorMap y_narrow;     // the last chunk of a tile that 64 does not divide
  TensorMap base;
  TensorMap base_narrow;
  const void* bias;
  int64_t bias_stride;
  TileSchedule schedule;
  int segment_count;
  int k_blocks;           // of all segments and passes
  int n;
  bool bias_is_float;
  bool has_base;
};

}  // namespace kronafuse::cuda
