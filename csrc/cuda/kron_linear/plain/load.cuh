// Tiles of operand pairs copied ahead into shared memory.
#pragma once

#include "cuda/common/async.cuh"
#include "cuda/common/types.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/kron_linear/plain/work.cuh"

namespace kronafuse::cuda::plain {

// Copies the tiles of one stage after the other into shared memory.
template <class Traits>
class Producer {
  using T = typename Traits::T;

 public:
  KF_DEVICE Producer(const Work& work, unsigned char* shared, int first_m, int first_n, int thread)
      : work_(work),
        shared_(shared),
        first_m_(first_m),
        first_n_(first_n),
        a_row_(thread / Traits::kChunksK),
        a_chunk_(thread % Traits::kChunksK),
        b_tile_row_(thread / Traits::kBPerRow),
        b_chunk_(thread % Traits::kBPerRow) {
    if (work.has_block) {
      const int last = min_of(first_n + Traits::kTileN, work.columns.count) - 1;
      first_group_ = first_n / work.columns.right;
      groups_ = last / work.columns.right - first_group_ + 1;
    }
  }

  // Steps over k in all, and those of the block tail among them, which come first.
  KF_DEVICE int block_steps() const { return groups_ * steps_of(work_.block.length); }
  KF_DEVICE int steps() const {
    int total = block_steps();
    for (int i = 0; i < work_.count; ++i) total += steps_of(work_.segments[i].length);
    return total;
  }

  // Starts the copies of the next step's tiles.
  KF_DEVICE void load(int stage) {
    while (k_ >= length_) open_next();
    unsigned char* a_tile = shared_ + stage * Traits::kStageBytes;
    unsigned char* b_tile = a_tile + Traits::kABytes;
    if (a_copied_) {
      copy_a(a_tile);
    } else {
      gather_a(a_tile);
    }
    if (b_copied_) {
      copy_b(b_tile);
    } else {
      gather_b(b_tile);
    }
    k_ += Traits::kTileK;
  }

 private:
  static KF_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
  static KF_DEVICE int steps_of(int length) { return (length + Traits::kTileK - 1) / Traits::kTileK; }

  KF_DEVICE const Segment& segment() const {
    return index_ < groups_ ? work_.block : work_.segments[index_ - groups_];
  }

  // Rows past the last token repeat it; nothing of them is stored.
  KF_DEVICE int64_t token(int row) const { return min_of(first_m_ + row, work_.tokens - 1); }

  // Row of b for a column of the tile, negative where there is none: a group of the block tail has rows for its own
  // columns, and zeros stand for the others.
  KF_DEVICE int b_row(int column) const {
    if (index_ >= groups_) return column < work_.columns.count ? work_.columns.feature(column) : -1;
    const int row = column - (first_group_ + index_) * work_.columns.right;
    return row < work_.columns.right ? row : -1;
  }

  KF_DEVICE void open_next() {
    ++index_;
    k_ = 0;
    const Segment& now = segment();
    length_ = now.length;
    a_copied_ = now.a.copied;
    b_copied_ = now.b.copied;
    a_data_ = static_cast<const T*>(now.a.data);
    if (index_ < groups_) a_data_ += (first_group_ + index_) * work_.block_group_stride;
    if (a_copied_) {
#pragma unroll
      for (int i = 0; i < Traits::kAChunks; ++i) {
        a_from_[i] = a_data_ + token(a_row_ + i * Traits::kARows) * now.a.stride_row + a_chunk_ * Traits::kChunk;
      }
    }
    if (b_copied_) open_b(now.b);
  }

  KF_DEVICE void open_b(const Operand& b) {
    const T* data = static_cast<const T*>(b.data);
    b_valid_ = 0;
    if constexpr (Traits::kTransposedB) {
      // Groups and N are multiples of a chunk here: it lies inside or outside as a whole.
      const int row = b_row(first_n_ + b_chunk_ * Traits::kChunk);
      b_step_ = b.stride_k;
      b_from_[0] = data + row + b_tile_row_ * b_step_;
      b_valid_ = row >= 0;
    } else {
#pragma unroll
      for (int i = 0; i < Traits::kBChunks; ++i) {
        const int row = b_row(first_n_ + b_tile_row_ + i * Traits::kBRows);
        b_from_[i] = data + row * b.stride_row + b_chunk_ * Traits::kChunk;
        b_valid_ |= (row >= 0) << i;
      }
    }
  }

  KF_DEVICE void copy_a(unsigned char* tile) const {
    unsigned char* target = tile + Traits::offset_k(a_row_, a_chunk_);
    const bool valid = k_ + a_chunk_ * Traits::kChunk < length_;
#pragma unroll
    for (int i = 0; i < Traits::kAChunks; ++i) {
      cp_async_16(target + i * Traits::kARows * Traits::kChunksK * 16, a_from_[i] + k_, valid);
    }
  }

  KF_DEVICE void copy_b(unsigned char* tile) const {
    unsigned char* target = tile + Traits::offset_b(b_tile_row_, b_chunk_);
    if constexpr (Traits::kTransposedB) {
      const T* from = b_from_[0] + k_ * b_step_;
#pragma unroll
      for (int i = 0; i < Traits::kBChunks; ++i) {
        const bool valid = b_valid_ && k_ + b_tile_row_ + i * Traits::kBRows < length_;
        cp_async_16(target + i * Traits::kBRows * Traits::kBPerRow * 16, from + i * Traits::kBRows * b_step_, valid);
      }
    } else {
      const bool inside = k_ + b_chunk_ * Traits::kChunk < length_;
#pragma unroll
      for (int i = 0; i < Traits::kBChunks; ++i) {
        const bool valid = inside && (b_valid_ >> i & 1);
        cp_async_16(target + i * Traits::kBRows * Traits::kBPerRow * 16, b_from_[i] + k_, valid);
      }
    }
  }

  // Elements begin .. end - 1 of eight that are `stride` apart, zeros for the others. Asked for together: in the others'
  // place stands the nearest, so that no branch parts the loads.
  template <class Source>
  static KF_DEVICE Vec16<T> gathered(const Source* from, int64_t stride, int begin, int end) {
    Vec16<T> values = {};
    if (begin >= end || begin >= Traits::kChunk || end <= 0) return values;
    Source found[Traits::kChunk];
#pragma unroll
    for (int e = 0; e < Traits::kChunk; ++e) {
      found[e] = from[(e < begin ? begin : e < end ? e : end - 1) * stride];
    }
#pragma unroll
    for (int e = 0; e < Traits::kChunk; ++e) {
      if (e >= begin && e < end) values[e] = from_float<T>(to_float(found[e]));
    }
    return values;
  }

  static KF_DEVICE Vec16<T> gathered(const Operand& operand, int64_t first, int64_t stride, int begin, int end) {
    if (operand.is_float32) return gathered(static_cast<const float*>(operand.data) + first, stride, begin, end);
    return gathered(static_cast<const T*>(operand.data) + first, stride, begin, end);
  }

  // In any strides, a chunk at a time: this path must not take registers from the other.
  KF_DEVICE void gather_a(unsigned char* tile) const {
    const Operand& a = segment().a;
    const int first = k_ + a_chunk_ * Traits::kChunk;
#pragma unroll 1
    for (int row = a_row_; row < Traits::kTileM; row += Traits::kARows) {
      const T* from = a_data_ + token(row) * a.stride_row + first * a.stride_k;
      store_16(tile + Traits::offset_k(row, a_chunk_), gathered(from, a.stride_k, 0, length_ - first));
    }
  }

  KF_DEVICE void gather_b(unsigned char* tile) const {
    const Operand& b = segment().b;
    const bool grouped = index_ < groups_;
#pragma unroll 1
    for (int i = 0; i < Traits::kBChunks; ++i) {
      const int tile_row = b_tile_row_ + i * Traits::kBRows;
      unsigned char* target = tile + Traits::offset_b(tile_row, b_chunk_);
      if constexpr (Traits::kTransposedB) {
        const int column = first_n_ + b_chunk_ * Traits::kChunk, k = k_ + tile_row;
        if (work_.columns.permuted && !grouped) {
          scatter_columns(reinterpret_cast<T*>(target), column, k);
          continue;
        }
        const int row = grouped ? column - (first_group_ + index_) * work_.columns.right : column;
        const int rows = k >= length_ ? 0 : grouped ? work_.columns.right : work_.columns.count;
        store_16(target, gathered(b, row * b.stride_row + k * b.stride_k, b.stride_row, -row, rows - row));
      } else {
        const int row = b_row(first_n_ + tile_row), k = k_ + b_chunk_ * Traits::kChunk;
        const int end = row < 0 ? 0 : length_ - k;
        store_16(target, gathered(b, row * b.stride_row + k * b.stride_k, b.stride_k, 0, end));
      }
    }
  }

  // Neighbouring columns of a permuted y are anywhere in b.
  KF_DEVICE void scatter_columns(T* target, int column, int k) const {
    const Operand& b = segment().b;
#pragma unroll 1
    for (int e = 0; e < Traits::kChunk; ++e) {
      const int64_t row = b_row(column + e);
      const bool valid = row >= 0 && k < length_;
      target[e] = from_float<T>(
          valid ? load_factor(b.data, row * b.stride_row + k * b.stride_k, b.is_float32, T{}) : 0.f);
    }
  }

  const Work& work_;
  unsigned char* shared_;
  int first_m_, first_n_;
  int a_row_, a_chunk_, b_tile_row_, b_chunk_;  // the first chunks of this thread; the others are in rows below
  int first_group_ = 0, groups_ = 0;  // of the block tail, that the tile touches
  int index_ = -1;                    // of the segment: a group, then a dense pair
  int k_ = 0, length_ = 0;            // the next step's first value of k, and the segment's end
  bool a_copied_ = false, b_copied_ = false;
  const T* a_data_ = nullptr;
  const T* a_from_[Traits::kAChunks];
  const T* b_from_[Traits::kBChunks];
  int64_t b_step_ = 0;    // from one value of k to the next
  uint32_t b_valid_ = 0;  // which of b's chunks have rows
};

}  // namespace kronafuse::cuda::plain
