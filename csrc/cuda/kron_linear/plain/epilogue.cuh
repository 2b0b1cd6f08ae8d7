// What the plain form does with accumulators: scales of features, products by multiply-adds, bias, base, the store.
#pragma once

#include "cuda/common/types.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/kron_linear/plain/multiply.cuh"
#include "cuda/kron_linear/values.cuh"

namespace kronafuse::cuda::plain {

// Feature (n1, n2) gets Σ_j factor[j] · inner[m, j], each at an offset that n1 and n2 give: A ⊗ I, and I ⊗ B of so few
// rows that most of a matrix product would be zeros.
struct Pointwise {
  const void* inner = nullptr;  // absent where null
  int64_t inner_token = 0, inner_left = 0, inner_right = 0, inner_j = 0;
  const void* factor = nullptr;
  bool is_float32 = false;
  int64_t factor_left = 0, factor_right = 0, factor_j = 0;
  int length = 0;
  bool vectors = false;  // eight values of n2 lie together and aligned in inner, and N2 is a multiple of eight
};

// base and y.
struct Plane {
  void* data = nullptr;
  int64_t stride_m = 0, stride_n = 0;
  bool vectors = false;  // eight features lie together and aligned
};

struct Output {
  Values block_scale;  // multiplies what the block tail gave
  Pointwise pointwise;
  Values pointwise_scale;
  Values bias;
  Plane base, y;
};

// Accumulators lie as fragments do: a thread has two neighbouring columns in rows 8 apart.
template <class Traits>
class Epilogue {
  using T = typename Traits::T;
  static constexpr int kChunks = Traits::kWarpN / 8;      // of eight columns, in a row of a slab
  static constexpr int kSlabStride = Traits::kWarpN + 8;  // floats: eight rows of fragments are in different banks
  static constexpr int kSlabs = Traits::kWarpsM * Traits::kWarpsN * 16 * kSlabStride * 4;
  static constexpr int kStages = Traits::kStages * Traits::kStageBytes;

 public:
  // Stages, then slabs in their place, and behind them a value for each feature of the tile.
  static constexpr int kValuesOffset = kStages > kSlabs ? kStages : kSlabs;
  static constexpr int kSharedBytes = kValuesOffset + Traits::kTileN * 4;

  KF_DEVICE Epilogue(const Work& work, const Output& output, unsigned char* shared, int first_m, int first_n,
                     const Consumer<Traits>& warp)
      : work_(work),
        output_(output),
        shared_(shared),
        values_(reinterpret_cast<float*>(shared + kValuesOffset)),
        lane_(warp.lane),
        tile_n_(first_n),
        first_m_(first_m + warp.first_row),
        column_(warp.first_column) {}

  // Reads a value for each feature of the tile; all threads take part, and all may use it afterwards.
  KF_DEVICE void stage(const Values& values, int thread) const {
    __syncthreads();
    for (int i = thread; i < Traits::kTileN; i += Traits::kThreads) {
      // Columns outside the problem stand for its last one; nothing of them is stored.
      const int column = tile_n_ + i < work_.columns.count ? tile_n_ + i : work_.columns.count - 1;
      values_[i] = values(work_.columns.feature(column));
    }
    __syncthreads();
  }

  KF_DEVICE void multiply(Accumulators<Traits>& acc) const {
#pragma unroll
    for (int j = 0; j < Traits::kFragmentsN; ++j) {
      const float low = value(j, 0), high = value(j, 1);
#pragma unroll
      for (int i = 0; i < Traits::kFragmentsM; ++i) {
        acc[i][j][0] *= low;
        acc[i][j][1] *= high;
        acc[i][j][2] *= low;
        acc[i][j][3] *= high;
      }
    }
  }

  KF_DEVICE void add(Accumulators<Traits>& acc) const {
#pragma unroll
    for (int j = 0; j < Traits::kFragmentsN; ++j) {
      const float low = value(j, 0), high = value(j, 1);
#pragma unroll
      for (int i = 0; i < Traits::kFragmentsM; ++i) {
        acc[i][j][0] += low;
        acc[i][j][1] += high;
        acc[i][j][2] += low;
        acc[i][j][3] += high;
      }
    }
  }

  // Through the warp's own slab of shared memory, 16 rows at a time, so that a lane stores neighbours. Rounding point:
  // products, tails, bias and base together, once. The staged values scale the multiply-adds, if `scaled`.
  KF_DEVICE void store(const Accumulators<Traits>& acc, int warp, bool scaled) const {
    float* slab = reinterpret_cast<float*>(shared_) + warp * 16 * kSlabStride;
#pragma unroll
    for (int i = 0; i < Traits::kFragmentsM; ++i) {
      const int first_row = first_m_ + i * 16;
      sync_warp();
#pragma unroll
      for (int j = 0; j < Traits::kFragmentsN; ++j) {
        float* at = slab + lane_ / 4 * kSlabStride + j * 8 + lane_ % 4 * 2;
        at[0] = acc[i][j][0];
        at[1] = acc[i][j][1];
        at[8 * kSlabStride] = acc[i][j][2];
        at[8 * kSlabStride + 1] = acc[i][j][3];
      }
      sync_warp();
      if (output_.pointwise.inner != nullptr) {
        add_pointwise(slab, first_row, scaled);
        sync_warp();
      }
      if (output_.y.vectors) {
        store_vectors(slab, first_row);
      } else {
        store_elements(slab, first_row);
      }
    }
  }

 private:
  KF_DEVICE float value(int j, int e) const { return values_[column_ + j * 8 + lane_ % 4 * 2 + e]; }

  KF_DEVICE void add_pointwise(float* slab, int first_row, bool scaled) const {
    const Pointwise& tail = output_.pointwise;
#pragma unroll 1
    for (int index = lane_; index < 16 * kChunks; index += 32) {
      const int row = index / kChunks, first = index % kChunks * 8;
      const int64_t m = first_row + row;
      const int n = tile_n_ + column_ + first;
      if (m >= work_.tokens || n >= work_.columns.count) continue;
      float* sums = slab + row * kSlabStride + first;
      const float* scales = scaled ? values_ + column_ + first : nullptr;
      const T* inner = static_cast<const T*>(tail.inner) + m * tail.inner_token;
      const int n1 = n / work_.columns.right, n2 = n % work_.columns.right;
      if (tail.vectors) {
        add_vectors(sums, inner + n2, n1, scales);
      } else {
        const int count = work_.columns.count - n < 8 ? work_.columns.count - n : 8;
        add_elements(sums, inner, n, count, scales);
      }
    }
  }

  // A ⊗ I for eight neighbouring values of n2.
  KF_DEVICE void add_vectors(float* sums, const T* inner, int64_t n1, const float* scales) const {
    const Pointwise& tail = output_.pointwise;
    float added[8] = {};
#pragma unroll 1
    for (int k = 0; k < tail.length; ++k) {
      const float factor = load_factor(tail.factor, n1 * tail.factor_left + k * tail.factor_j, tail.is_float32, T{});
      const Vec16<T> values = load_16<T>(inner + k * tail.inner_j);
#pragma unroll
      for (int e = 0; e < 8; ++e) added[e] += factor * to_float(values[e]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[e] += scales != nullptr ? scales[e] * added[e] : added[e];
  }

  KF_DEVICE void add_elements(float* sums, const T* inner, int n, int count, const float* scales) const {
    const Pointwise& tail = output_.pointwise;
#pragma unroll 1
    for (int e = 0; e < count; ++e) {
      const int64_t n1 = (n + e) / work_.columns.right, n2 = (n + e) % work_.columns.right;
      const T* from = inner + n1 * tail.inner_left + n2 * tail.inner_right;
      const int64_t factor_at = n1 * tail.factor_left + n2 * tail.factor_right;
      float added = 0.f;
#pragma unroll 1
      for (int k = 0; k < tail.length; ++k) {
        const float factor = load_factor(tail.factor, factor_at + k * tail.factor_j, tail.is_float32, T{});
        added += factor * to_float(from[k * tail.inner_j]);
      }
      sums[e] += scales != nullptr ? scales[e] * added : added;
    }
  }

  KF_DEVICE void store_vectors(const float* slab, int first_row) const {
    const Plane &base = output_.base, &y = output_.y;
#pragma unroll
    for (int index = 0; index < 16 * kChunks; index += 32) {
      const int row = (index + lane_) / kChunks, first = (index + lane_) % kChunks * 8;
      const int64_t m = first_row + row, n = tile_n_ + column_ + first;
      if (m >= work_.tokens || n >= work_.columns.count) continue;
      const float* sums = slab + row * kSlabStride + first;
      Vec16<T> old, result;
      if (base.data != nullptr) {
        const T* from = static_cast<const T*>(base.data) + m * base.stride_m + n * base.stride_n;
        if (base.vectors) {
          old = load_16<T>(from);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) old[e] = from[e * base.stride_n];
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        result[e] = from_float<T>(base.data != nullptr ? sums[e] + to_float(old[e]) : sums[e]);
      }
      store_16(static_cast<T*>(y.data) + m * y.stride_m + n, result);
    }
  }

  KF_DEVICE void store_elements(const float* slab, int first_row) const {
    const Plane &base = output_.base, &y = output_.y;
#pragma unroll 1
    for (int index = lane_; index < 16 * Traits::kWarpN; index += 32) {
      const int row = index / Traits::kWarpN, along = index % Traits::kWarpN;
      const int64_t m = first_row + row;
      const int n = tile_n_ + column_ + along;
      if (m >= work_.tokens || n >= work_.columns.count) continue;
      const int64_t feature = work_.columns.feature(n);
      float sum = slab[row * kSlabStride + along];
      if (base.data != nullptr) {
        sum += to_float(static_cast<const T*>(base.data)[m * base.stride_m + feature * base.stride_n]);
      }
      static_cast<T*>(y.data)[m * y.stride_m + feature * y.stride_n] = from_float<T>(sum);
    }
  }

  const Work& work_;
  const Output& output_;
  unsigned char* shared_;
  float* values_;
  int lane_, tile_n_, first_m_, column_;  // of the tile's columns: the first, and the warp's first among them
};

}  // namespace kronafuse::cuda::plain
