// From a warp's accumulators to memory in runs of eight neighbours: values of o or rows, as they lie in the result.
//
// A fragment holds pairs along o, four lanes a row. Thirty-two runs at a time go through shared memory, in fp32, after
// which every lane has one.
#pragma once

#include "cuda/common/vector.cuh"
#include "cuda/kron_linear/contraction.cuh"

namespace kronafuse::cuda {

// 16×16 sums as 16 rows of two runs, or 32×8 as 8 columns of four runs; padded so that fragments meet few banks twice.
template <class Traits>
struct ContractionStaging {
  static constexpr bool kRowsTogether = Traits::kRowsTogether;
  static constexpr int kRows = kRowsTogether ? 32 : 16;
  static constexpr int kColumns = kRowsTogether ? 8 : 16;
  static constexpr int kPitch = kRowsTogether ? 36 : 20;
  static_assert((kRowsTogether ? 8 * kPitch : 16 * kPitch) * 4 <= kContractionStagingBytes);

  static KF_DEVICE int index(int row, int column) {
    return kRowsTogether ? column * kPitch + row : row * kPitch + column;
  }
  // Where this lane's run begins.
  static KF_DEVICE int own_row() { return kRowsTogether ? lane() % 4 * 8 : lane() / 2; }
  static KF_DEVICE int own_column() { return kRowsTogether ? lane() / 4 : lane() % 2 * 8; }
};

// The lane's part of the result: eight neighbours from (row, column of the slot's factor) on.
template <class Traits>
struct ContractionRun {
  const ContractionParameters& p;
  const ContractionSlot& slot;
  int row, column, count;  // count: how many of the eight there are

  KF_DEVICE ContractionRun(const ContractionParameters& parameters, const ContractionSlot& own, int first_row,
                           int first_column)
      : p(parameters), slot(own), row(first_row), column(first_column) {
    const int along = Traits::kRowsTogether ? p.rows - row : slot.width - column;
    const int across = Traits::kRowsTogether ? slot.width - column : p.rows - row;
    count = across <= 0 ? 0 : along < 8 ? along : 8;
  }

  KF_DEVICE int row_at(int i) const { return Traits::kRowsTogether ? row + i : row; }
  KF_DEVICE int column_at(int i) const { return Traits::kRowsTogether ? column : column + i; }
  KF_DEVICE int64_t offset(const ContractionTarget& target, int i) const {
    return row_offset(p.group, row_at(i), target.stride_m, target.stride_g) + column_at(i) * target.stride_o;
  }

  // out = base + out_scale ⊙ s · sums.
  KF_DEVICE void store(float* sums, float scale) const {
    using T = typename Traits::T;
    T* out = static_cast<T*>(slot.out.data);
    const T* base = static_cast<const T*>(p.base.data);
    if (p.out_scale.data != nullptr) {
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        sums[i] *= scale_at(p.out_scale, p.group.remainder(row_at(i)), column_at(i));
      }
    }
    if (slot.run == 8 && count == 8) {
      const Vec16<float> low = load_16<float>(sums), high = load_16<float>(sums + 4);
      Vec16<T> eight = {};
      if (base != nullptr) eight = load_16<T>(base + offset(p.base, 0));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float value = (i < 4 ? low[i & 3] : high[i & 3]) * scale;
        // Rounding point 1: T contains the scale.
        eight[i] = from_float<T>(base == nullptr ? value : value + to_float(eight[i]));
      }
      store_16(out + offset(slot.out, 0), eight);
      return;
    }
    const auto value_at = [&](int i) {
      const float value = sums[i] * scale;
      return base == nullptr ? value : value + to_float(base[offset(p.base, i)]);
    };
    const int step = slot.run >= 2 ? 2 : 1;
#pragma unroll 1
    for (int i = 0; i < count; i += step) {
      const float value = value_at(i);
      T* target = out + offset(slot.out, i);
      if (step == 2 && i + 1 < count) {
        *reinterpret_cast<uint32_t*>(target) = pack2<T>(value, value_at(i + 1));
      } else {
        *target = from_float<T>(value);
      }
    }
  }

  // The sums of one split as they are; `sum_splits` makes the result of them.
  KF_DEVICE void store_partial(const float* sums, int split) const {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int64_t line = static_cast<int64_t>(split) * p.rows + row_at(i);
      p.partial[line * p.columns + slot.column + column_at(i)] = sums[i];
    }
  }
};

// Stores one warp's sums, which begin at this row and at this column tile among those of all factors.
template <class Traits>
KF_DEVICE void store_sums(const ContractionParameters& p, float* staging, int first_row, int first_tile,
                          const ContractionSums<Traits>& sums) {
  using Staging = ContractionStaging<Traits>;
  constexpr int kTilesDown = Staging::kRows / 16, kTilesBeside = Staging::kColumns / 8;
#pragma unroll
  for (int j = 0; j < Traits::kColumnTiles; j += kTilesBeside) {
    if (first_tile + j >= p.column_tiles) break;
#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; i += kTilesDown) {
      sync_warp();
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        // n: of the two fragments, then of the four values of each.
        const int down = n / 4 % kTilesDown, beside = n / 4 % kTilesBeside;
        const int row = down * 16 + n % 4 / 2 * 8 + lane() / 4, column = beside * 8 + lane() % 4 * 2 + n % 2;
        staging[Staging::index(row, column)] = sums[i + down][j + beside][n % 4];
      }
      sync_warp();
      const int tile = first_tile + j + Staging::own_column() / 8;
      if (tile >= p.column_tiles) continue;
      const ContractionSlot& slot = slot_of(p, tile);
      float* own = staging + Staging::index(Staging::own_row(), Staging::own_column());
      const ContractionRun<Traits> run(p, slot, first_row + i * 16 + Staging::own_row(),
                                       (tile - slot.tile) * 8 + Staging::own_column() % 8);
      if (p.partial != nullptr) {
        run.store_partial(own, static_cast<int>(blockIdx.z));
      } else {
        run.store(own, scale_value(slot.scale, slot.scale_tensor, slot.scale_dtype));
      }
    }
  }
}

}  // namespace kronafuse::cuda
