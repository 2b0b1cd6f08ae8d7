// The Hopper form of fat_linear: whether it can serve a call, choice of the tile, entry.
#include "cuda/kron_linear/fat_linear_sm90a.h"

#include <limits>

#include "cuda/common/types.cuh"

namespace kronafuse::cuda {
namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();
// How much longer mma.sync takes for as many products; by Hopper's published rates.
constexpr double kPlainSlower = 1.6;

// A tensor (outer, middle, inner) as a tensor map's dimensions have it: one box of it in a stage.
struct Boxes {
  TensorExtent extents[3];
  Swizzle swizzle;
};

Boxes x_boxes(const FatParameters& p) {
  return {{{p.right_in, 2, kFatHopperBlockK}, {p.left_in, p.x_1 * 2, 1}, {p.tokens, p.x_m * 2, kFatHopperTileM}},
          Swizzle::b128};
}

bool is_transposed(const FatParameters& p) { return p.w_k2 != 1; }

Boxes weight_boxes(const FatParameters& p, int tile_n) {
  const int64_t n = static_cast<int64_t>(p.left_out) * p.right_out;
  const Swizzle swizzle = fat_hopper_swizzle(tile_n, is_transposed(p));
  if (is_transposed(p)) {
    return {{{n, 2, fat_hopper_box_columns(tile_n)},
             {p.right_in, p.w_k2 * 2, kFatHopperBlockK},
             {p.left_in, p.w_k1 * 2, 1}},
            swizzle};
  }
  return {{{p.right_in, 2, kFatHopperBlockK}, {p.left_in, p.w_k1 * 2, 1}, {n, p.w_2 * 2, tile_n}}, swizzle};
}

// As CUDA describes tensor maps: each dimension steps over the whole of those before it.
bool nested(const Boxes& boxes) {
  int64_t reach = boxes.extents[0].size * 2;
  for (int d = 1; d < 3; ++d) {
    const TensorExtent& extent = boxes.extents[d];
    if (extent.stride_bytes < reach) return false;
    reach += (extent.size - 1) * extent.stride_bytes;
  }
  return true;
}

bool describable(const void* data, DType dtype, const Boxes& boxes) {
  return nested(boxes) && tensor_map_serves(data, dtype, 3, boxes.extents, boxes.swizzle);
}

bool serves(const FatParameters& p, DType dtype) {
  const bool features_in_order = p.left_out == 1 || p.w_1 == p.w_2 * p.right_out;
  return p.weight != nullptr && p.in_scale == nullptr && p.x_vectors && p.w_vectors && p.y_vectors &&
         (p.base == nullptr || p.base_vectors) && features_in_order && p.tokens <= kMaxIndex - kFatHopperTileM &&
         describable(p.x, dtype, x_boxes(p)) && describable(p.weight, dtype, weight_boxes(p, kFatHopperTilesN[0]));
}

void set_grid(FatParameters& p, int tile_n) {
  p.units_per_group = (p.right_out + tile_n - 1) / tile_n;
  p.n_blocks = p.units = p.units_per_group * p.left_out;
  p.m_blocks = (p.tokens + kFatHopperTileM - 1) / kFatHopperTileM;
}

double predicted(FatParameters p, int tile_n, int multiprocessors) {
  set_grid(p, tile_n);
  return fat_predicted_time(p.m_blocks * p.n_blocks, multiprocessors, kFatHopperTileM, tile_n);
}

// The row of the least predicted time, wider tiles first; -1 where the plain form's is less.
int choose(const FatParameters& p, double plain_time, int multiprocessors) {
  int best = -1;
  double least = plain_time * kPlainSlower;
  for (int row = kFatHopperRows - 1; row >= 0; --row) {
    const double time = predicted(p, kFatHopperTilesN[row], multiprocessors);
    if (time < least) {
      best = row;
      least = time;
    }
  }
  return best;
}

template <class T, int TILE_N>
void launch_tile(const FatHopperProblem& problem, int multiprocessors, Stream stream) {
#ifndef KRONAFUSE_ONE_INSTANCE
  if (is_transposed(problem.p)) {
    launch_fat_linear_sm90a<T, TILE_N, true>(problem, multiprocessors, stream);
    return;
  }
#endif
  launch_fat_linear_sm90a<T, TILE_N, false>(problem, multiprocessors, stream);
}

template <class T>
void launch_row(const FatHopperProblem& problem, int row, int multiprocessors, Stream stream) {
  static_assert(kFatHopperRows == 4);
  if (row == 0) {
    launch_tile<T, kFatHopperTilesN[0]>(problem, multiprocessors, stream);
  } else if (row == 1) {
    launch_tile<T, kFatHopperTilesN[1]>(problem, multiprocessors, stream);
  } else if (row == 2) {
    launch_tile<T, kFatHopperTilesN[2]>(problem, multiprocessors, stream);
  } else {
    launch_tile<T, kFatHopperTilesN[3]>(problem, multiprocessors, stream);
  }
}

bool fat_linear_sm90a(const FatParameters& given, DType dtype, int config, double plain_time, Stream stream) {
#ifdef KRONAFUSE_ONE_INSTANCE
  if (dtype != DType::bf16 || is_transposed(given)) return false;
#endif
  if (!serves(given, dtype)) return false;
  const int multiprocessors = device_info().multiprocessors;
  const int row = config >= 0 ? config : choose(given, plain_time, multiprocessors);
  if (row < 0) return false;
  const int tile_n = kFatHopperTilesN[row];
  FatHopperProblem problem{{}, {}, given};
  set_grid(problem.p, tile_n);
  if (problem.p.m_blocks > kMaxIndex / problem.p.n_blocks) return false;
  const Boxes x = x_boxes(given), weight = weight_boxes(given, tile_n);
  problem.x = make_tensor_map(given.x, dtype, 3, x.extents, x.swizzle);
  problem.weight = make_tensor_map(given.weight, dtype, 3, weight.extents, weight.swizzle);
#ifdef KRONAFUSE_ONE_INSTANCE
  launch_row<bf16>(problem, row, multiprocessors, stream);
#else
  if (dtype == DType::bf16) {
    launch_row<bf16>(problem, row, multiprocessors, stream);
  } else {
    launch_row<f16>(problem, row, multiprocessors, stream);
  }
#endif
  return true;
}

const bool registered = (fat_hopper_form() = fat_linear_sm90a, true);

}  // namespace
}  // namespace kronafuse::cuda
