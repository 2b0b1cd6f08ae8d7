// Rows of x times resident factors, memory-bound: every warp copies its own tiles of x ahead into shared memory and
// multiplies them by the factors that the whole block keeps there. Warps meet only where they share a row's k.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/kron_linear/contraction_load.cuh"
#include "cuda/kron_linear/contraction_multiply.cuh"
#include "cuda/kron_linear/contraction_store.cuh"

namespace kronafuse::cuda {

template <class Element, Neighbours Together, int ColumnTiles>
__global__ void __launch_bounds__(kContractionThreads,
                                  (ContractionTraits<Element, Together, ColumnTiles>::kBlocks))
    contraction_kernel(ContractionParameters p) {
  using Traits = ContractionTraits<Element, Together, ColumnTiles>;
  const ContractionPlan& plan = p.plan;
  unsigned char* const factors = dynamic_shared();
  unsigned char* const stages = factors + ColumnTiles * 8 * plan.factor_pitch;
  unsigned char* const own_stages = stages + warp_index() * plan.stages * plan.stage_bytes;
  unsigned char* const stagings = stages + kContractionWarps * plan.stages * plan.stage_bytes;
  float* const staging = reinterpret_cast<float*>(stagings + warp_index() * kContractionStagingBytes);
  float* const shared_sums = reinterpret_cast<float*>(stagings + kContractionWarps * kContractionStagingBytes);

  const int groups = plan.groups(), share = warp_index() % plan.warps_k;
  const int first_tile = static_cast<int>(blockIdx.y) * ColumnTiles;
  const int active_pairs = (p.column_tiles - first_tile + 1) / 2;
  const int begin = static_cast<int>(blockIdx.z) * plan.tiles_per_split;
  const int end = begin + plan.tiles_per_split < plan.tiles ? begin + plan.tiles_per_split : plan.tiles;

  // All warps of a block go round equally often, so that they can meet; beyond the last row they do nothing.
  const int units = (p.rows + Traits::kRows - 1) / Traits::kRows;
  const int first_unit = static_cast<int>(blockIdx.x) * groups;
  const int stride = static_cast<int>(gridDim.x) * groups;
  const int rounds = first_unit < units ? (units - first_unit + stride - 1) / stride : 0;
  const int own_unit = first_unit + warp_index() / plan.warps_k;
  const auto row_of = [&](int round) { return (own_unit + round * stride) * Traits::kRows; };
  const auto tile_of = [&](int position) { return begin + position * plan.warps_k + share; };

  const int part_k = plan.part_positions * plan.warps_k * plan.tile_k;
  if (plan.factors_stay()) copy_factors<Traits>(p, factors, begin * plan.tile_k, part_k);
  if constexpr (Traits::kRowsTogether) {
    clear_stages<Traits>(p, own_stages);
    sync_warp();
  }

  ContractionSums<Traits> sums = {};
  int round = 0, position = 0, in_part = 0, stage = 0;
  int ahead_round = 0, ahead_position = 0, ahead_stage = 0;
  // The first steps only ask for tiles.
#pragma unroll 1
  for (int step = 1 - plan.stages; round < rounds; ++step) {
    const bool comes_whole = plan.factors_stay() && step == 0;
    const bool comes_in_parts = !plan.factors_stay() && step >= 0 && position % plan.part_positions == 0;
    if (comes_whole || comes_in_parts) {
      const int first_k = (begin + position * plan.warps_k) * plan.tile_k;
      if (comes_in_parts) {
        in_part = 0;
        __syncthreads();
        copy_factors<Traits>(p, factors, first_k, part_k);
      }
      read_factors<Traits>(p, factors, first_k, part_k);
      wait_for_copies(comes_whole ? plan.stages - 1 : 0);
      __syncthreads();
    }
    if (step >= 0) {
      wait_for_copies(plan.stages - 2);
      sync_warp();
    }
    if (ahead_round < rounds) {
      const int tile = tile_of(ahead_position), row = row_of(ahead_round);
      if (tile < end && row < p.rows) {
        request_tile<Traits>(p, own_stages + ahead_stage * plan.stage_bytes, row, tile * plan.tile_k);
      }
      if (++ahead_position == plan.positions) ahead_position = 0, ++ahead_round;
      if (++ahead_stage == plan.stages) ahead_stage = 0;
    }
    cp_async_commit();
    if (step < 0) continue;

    const int tile = tile_of(position), first_row = row_of(round);
    if (tile < end && first_row < p.rows) {
      unsigned char* const x = own_stages + stage * plan.stage_bytes;
      if (p.in_scale.data != nullptr) scale_tile<Traits>(p, x, first_row, tile * plan.tile_k);
      multiply_tile<Traits>(p, x, factors + (in_part * plan.warps_k + share) * plan.tile_k * 2, active_pairs, sums);
    }
    if (++stage == plan.stages) stage = 0;
    ++in_part;
    if (++position < plan.positions) continue;

    if (plan.warps_k > 1) add_warps<Traits>(plan, shared_sums, share, sums);
    if (share == 0 && first_row < p.rows) store_sums<Traits>(p, staging, first_row, first_tile, sums);
    set_zero<Traits>(sums);
    position = in_part = 0;
    ++round;
  }
}

template <class Element, Neighbours Together, int ColumnTiles>
void launch_contraction(const ContractionParameters& p, Stream stream) {
  const ContractionPlan& plan = p.plan;
  const Dim3 grid{static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.column_blocks),
                  static_cast<unsigned>(plan.splits)};
  launch<contraction_kernel<Element, Together, ColumnTiles>>({grid, kContractionThreads, plan.shared_bytes, stream}, p);
}

// The instance for the plan's width.
template <Neighbours Together>
void contract_with(const ContractionParameters& p, DType dtype, Stream stream) {
#ifdef KRONAFUSE_ONE_INSTANCE
  KF_CHECK(dtype == DType::bf16, "this build has one instance of each kernel, for bfloat16; got ", dtype);
  launch_contraction<bf16, Together, 4>(p, stream);
#else
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    switch (p.plan.column_tiles) {
      case 2: return launch_contraction<T, Together, 2>(p, stream);
      case 4: return launch_contraction<T, Together, 4>(p, stream);
      default:
        if constexpr (Together == Neighbours::k) return launch_contraction<T, Together, 12>(p, stream);
    }
  });
#endif
}

}  // namespace kronafuse::cuda
