// The Hopper form of fat_linear: what its entry hands to the kernel's instances.
#pragma once

#include "cuda/common/stream.h"
#include "cuda/common/tma.cuh"
#include "cuda/kron_linear/fat_configs_sm90a.h"
#include "cuda/kron_linear/fat/parameters.cuh"

namespace kronafuse::cuda {

struct FatHopperProblem {
  TensorMap x;       // (M, I1, I2)
  TensorMap weight;  // (N, I1, I2), or (I1, I2, N) where W's features lie side by side
  FatParameters p;
};

// How a tile of W lies in a stage: rows of 64 k, or where N is contiguous boxes of a swizzle's span of n times 64 k.
// A tile of 96 or 160 columns has no whole number of 64-column boxes, and one wgmma knows one swizzle: its boxes are
// 32 columns wide.
constexpr Swizzle fat_hopper_swizzle(int tile_n, bool transposed) {
  return transposed && tile_n % 64 != 0 ? Swizzle::b64 : Swizzle::b128;
}

// Columns of a box of the transposed W.
constexpr int fat_hopper_box_columns(int tile_n) { return span_of(fat_hopper_swizzle(tile_n, true)) / 2; }

// Called by fat_linear with checked arguments and a row of fat_linear_sm90a_configurations, or -1: then it serves the
// call only where it predicts less than `plain_time`, in units of fat_predicted_time. False, and nothing is written,
// where it cannot serve: no W, an in_scale, shuffled features, operands that TMA cannot read, a base or y that cannot
// be moved by 16 bytes.
using FatHopperForm = bool (*)(const FatParameters& parameters, DType dtype, int config, double plain_time,
                               Stream stream);

// The Hopper form where this library has it: fat_linear_sm90a.cu puts its entry here when the library is loaded.
FatHopperForm& fat_hopper_form();

// Relative time by rule: whole rounds of blocks over the device, each as long as its tile is large.
double fat_predicted_time(int64_t tiles, int64_t at_a_time, int64_t tile_m, int64_t tile_n);

// Instantiated for each tile in fat_<tile>_sm90a.cu.
template <class T, int TILE_N, bool TRANSPOSED>
void launch_fat_linear_sm90a(const FatHopperProblem& problem, int multiprocessors, Stream stream);

}  // namespace kronafuse::cuda
