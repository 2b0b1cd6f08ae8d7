// Which row of configs_sm90a.h a problem gets when the caller names none.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kron_linear/configs_sm90a.h"

namespace kronafuse::cuda {

// Cycles of a multiprocessor, for comparing rows with each other: products at wgmma's rate or operands at L2's,
// whichever is slower, times the waves of tiles; results hidden behind the next tile's products only where consumers
// take turns. Derived from H200's data sheet, not measured.
inline double hopper_cost(HopperForm form, int cluster, int64_t m, int64_t n, int64_t k_steps, int multiprocessors) {
  constexpr double multiplies_per_cycle = 64 * 16 * 2;
  constexpr double l2_bytes_per_cycle = 40;       // of a multiprocessor's share, when all of them read
  constexpr double l2_bytes_per_cycle_alone = 64;  // of one by itself
  constexpr double store_bytes_per_cycle = 16;
  constexpr double start_cycles = 1500;
  const auto tiles_along = [](int64_t size, int tile) { return static_cast<double>((size + tile - 1) / tile); };
  const double tiles = tiles_along(m, form.tile_m * cluster) * tiles_along(n, form.tile_n);
  const double at_a_time = std::max(multiprocessors / cluster, 1);
  const double waves = static_cast<double>(static_cast<int64_t>((tiles + at_a_time - 1) / at_a_time));
  const double multiply = form.tile_m * form.tile_n * 16 / multiplies_per_cycle;
  const double busy = std::min(tiles * cluster, static_cast<double>(multiprocessors));
  const double l2_rate = std::min(l2_bytes_per_cycle * multiprocessors / busy, l2_bytes_per_cycle_alone);
  const double fetch = (form.tile_m + static_cast<double>(form.tile_n) / cluster) * 32 / l2_rate;
  const double loop = static_cast<double>(k_steps) * std::max(multiply, fetch);
  const double store = form.tile_m * form.tile_n * 2 / store_bytes_per_cycle;
  return start_cycles + waves * loop + (form.ping_pong ? 1 : waves) * store;
}

}  // namespace kronafuse::cuda
