// The Hopper form's way out: accumulators plus base, rounded, from registers to y.
#pragma once

#include "cuda/common/vector.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/kron_linear/fat/hopper_shared.cuh"

namespace kronafuse::cuda {

// Words i of lanes 4 q + t and words t of lanes 4 q + i change places.
KF_DEVICE void fat_hopper_transpose_quad(uint32_t (&words)[4]) {
  const bool odd = lane() % 2 != 0, upper = lane() % 4 >= 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = shfl_xor(odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? other : words[i];
    words[i + 1] = odd ? words[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = shfl_xor(upper ? words[i] : words[i + 2], 2);
    words[i] = upper ? other : words[i];
    words[i + 2] = upper ? words[i + 2] : other;
  }
}

// y = round(acc + base): the four lanes of a row exchange columns, so that each moves 16 bytes.
template <class Traits>
KF_DEVICE void fat_hopper_store(const float (&acc)[Traits::kTileN / 2], const FatParameters& p,
                                const FatHopperTile& tile, int first_row) {
  using T = typename Traits::T;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t m = first_row + lane() / 4 + half * 8;
    const int64_t base_row = m * p.base_m + tile.left_out * p.base_1, y_row = m * p.y_m + tile.left_out * p.y_1;
#pragma unroll
    for (int four = 0; four < Traits::kTileN / 32; ++four) {
      const int o2 = tile.right_out + (four * 4 + lane() % 4) * 8;
      const bool valid = m < p.tokens && o2 < p.right_out;
      Words4 base{};
      if (p.base != nullptr) {
        if (valid) base = words_of_vec16(load_16<T>(static_cast<const T*>(p.base) + base_row + o2));
        fat_hopper_transpose_quad(base.word);
      }
      Words4 result;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const sums = acc + (four * 4 + i) * 4 + half * 2;
        const Float2 added = unpack2<T>(base.word[i]);
        // Rounding point 2: x Wᵀ, delta, bias and base together, once.
        result.word[i] = pack2<T>(sums[0] + added.x, sums[1] + added.y);
      }
      fat_hopper_transpose_quad(result.word);
      if (valid) store_16(static_cast<T*>(p.y) + y_row + o2, vec16_of_words<T>(result));
    }
  }
}

}  // namespace kronafuse::cuda
