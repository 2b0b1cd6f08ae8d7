// out = W + s · (A ⊗ B): the kernel.
//
// A row n of A ⊗ B is the outer product of a row of A and a row of B. A block takes one row of B, in shared memory, and
// some rows of A: it computes B's row (with b_down, R multiply-adds an element) once for all of them, and streams their
// rows of W past it.
#pragma once

#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/scale.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/kron_merge/configs.h"

namespace kronafuse::cuda {

template <class T>
struct MergeTraits {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int kVector = Vec16<T>::count;

  KF_DEVICE static Wide widen(T value) {
    if constexpr (std::is_same_v<T, double>) {
      return value;
    } else {
      return to_float(value);
    }
  }
};

struct MergeParameters {
  const void* weight;
  const void* a;
  const void* b;
  const void* b_down;
  const void* scale_tensor;
  void* out;
  double scale;
  DType a_dtype, b_dtype, down_dtype, scale_dtype;
  int left_out, left_in, right_out, right_in, rank;  // N1, K1, N2, K2, R
  bool shuffled;
  int64_t w_n, w_k, out_n, out_k;
  int64_t a_n, a_k, b_n, b_k, down_r, down_k;
  int chunk, chunks;         // columns of B's row in a block
  int rows, row_blocks;      // rows of A in a block
  // A row of W in a block is one span, all of it, where B's row is one chunk; else one for each k1.
  int spans;
  int cells;  // vectors that touch a span, wherever it begins
};

// One vector of 16 bytes of out, as far as it lies in its span; no more than what is dear to compute again.
struct MergeCell {
  int left_out, left_in;  // n1, and the span's k1
  int local;              // element 0 of the vector, counted from the start of the span, which may lie after it
};

template <class T>
struct MergeBlock {
  using Traits = MergeTraits<T>;
  using Wide = typename Traits::Wide;
  static constexpr int kVector = Traits::kVector;
  const MergeParameters& p;
  int right_out, first_right, columns, first_left, items;
  Wide* right;

  KF_DEVICE MergeBlock(const MergeParameters& parameters, int64_t block)
      : p(parameters), right(reinterpret_cast<Wide*>(dynamic_shared())) {
    first_left = static_cast<int>(block % p.row_blocks) * p.rows;
    const int64_t rest = block / p.row_blocks;
    first_right = static_cast<int>(rest % p.chunks) * p.chunk;
    right_out = static_cast<int>(rest / p.chunks);
    columns = p.right_in - first_right < p.chunk ? p.right_in - first_right : p.chunk;
    const int rows = p.left_out - first_left < p.rows ? p.left_out - first_left : p.rows;
    items = rows * p.spans * p.cells;
  }

  // Threads read elements a vector apart: with a gap after each vector they fall into different banks.
  KF_DEVICE static int place(int column) { return column + column / kVector; }

  KF_DEVICE void load_right() {
    const Wide scale = scale_value<Wide>(static_cast<Wide>(p.scale), p.scale_tensor, p.scale_dtype);
    for (int column = threadIdx.x; column < columns; column += kMergeThreads) {
      const int64_t k2 = first_right + column;
      Wide value;
      if (p.b_down == nullptr) {
        value = load_number<Wide>(p.b, right_out * p.b_n + k2 * p.b_k, p.b_dtype);
      } else {
        value = 0;
        for (int r = 0; r < p.rank; ++r) {
          value += load_number<Wide>(p.b, right_out * p.b_n + r * p.b_k, p.b_dtype) *
                   load_number<Wide>(p.b_down, r * p.down_r + k2 * p.down_k, p.down_dtype);
        }
      }
      right[place(column)] = scale * value;
    }
  }

  KF_DEVICE int64_t row(const MergeCell& cell) const {
    const int64_t n1 = cell.left_out, n2 = right_out;
    return p.shuffled ? n2 * p.left_out + n1 : n1 * p.right_out + n2;
  }
  // The first column of the cell's span, its length, and which of the vector's elements lie in it.
  KF_DEVICE int64_t start(const MergeCell& cell) const {
    return p.spans == 1 ? 0 : static_cast<int64_t>(cell.left_in) * p.right_in + first_right;
  }
  KF_DEVICE int length() const { return p.spans == 1 ? p.left_in * p.right_in : columns; }
  KF_DEVICE static int begin(const MergeCell& cell) { return cell.local < 0 ? -cell.local : 0; }
  KF_DEVICE int end(const MergeCell& cell) const {
    return length() - cell.local < kVector ? length() - cell.local : kVector;
  }
  KF_DEVICE bool whole(const MergeCell& cell) const { return begin(cell) == 0 && end(cell) == kVector; }

  KF_DEVICE MergeCell cell(int item) const {
    const unsigned cells = p.cells, spans = p.spans;
    const unsigned rest = static_cast<unsigned>(item) / cells;
    const int index = static_cast<int>(static_cast<unsigned>(item) - rest * cells);
    MergeCell found{first_left + static_cast<int>(rest / spans), static_cast<int>(rest % spans), 0};
    const T* const first = static_cast<const T*>(p.out) + row(found) * p.out_n + start(found);
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(first) / sizeof(T) % kVector);
    found.local = index * kVector - (p.out_k == 1 ? shift : 0);
    return found;
  }

  KF_DEVICE Vec16<T> load(const MergeCell& cell) const {
    const int64_t column = start(cell) + cell.local;
    const T* const source = static_cast<const T*>(p.weight) + row(cell) * p.w_n + column * p.w_k;
    if (whole(cell) && p.w_k == 1 && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
      return load_16_streaming<T>(source);
    }
    Vec16<T> values{};
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e >= begin(cell) && e < end(cell)) values[e] = source[e * p.w_k];
    }
    return values;
  }

  KF_DEVICE Wide left(int n1, int k1) const {
    return p.a == nullptr ? Wide(1) : load_number<Wide>(p.a, n1 * p.a_n + k1 * p.a_k, p.a_dtype);
  }

  KF_DEVICE void store(const MergeCell& cell, Vec16<T> values) const {
    const int from = begin(cell), to = end(cell);
    if (from >= to) return;
    const int first = cell.local + from;
    int k1 = p.spans == 1 ? first / p.right_in : cell.left_in;
    int column = p.spans == 1 ? first - k1 * p.right_in : first;
    Wide factor = left(cell.left_out, k1);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e < from || e >= to) continue;
      const Wide sum = Traits::widen(values[e]) + factor * right[place(column)];
      // Rounding point: the sum, once.
      if constexpr (std::is_same_v<T, double>) {
        values[e] = sum;
      } else {
        values[e] = from_float<T>(sum);
      }
      if (++column == p.right_in && e + 1 < to) {
        column = 0;
        factor = left(cell.left_out, ++k1);
      }
    }
    T* const target = static_cast<T*>(p.out) + row(cell) * p.out_n + (start(cell) + cell.local) * p.out_k;
    if (whole(cell) && p.out_k == 1) {
      store_16_streaming(target, values);
      return;
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e >= from && e < to) target[e * p.out_k] = values[e];
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocks) merge_kernel(MergeParameters p) {
  MergeBlock<T> block(p, blockIdx.x);
  MergeCell cells[kMergeAhead];
  Vec16<T> values[kMergeAhead];
  const auto load = [&](int first) {
#pragma unroll
    for (int j = 0; j < kMergeAhead; ++j) {
      const int item = first + j * kMergeThreads;
      if (item >= block.items) continue;
      cells[j] = block.cell(item);
      values[j] = block.load(cells[j]);
    }
  };
  // W's first vectors are under way while B's row is put together.
  load(threadIdx.x);
  block.load_right();
  __syncthreads();
  for (int first = threadIdx.x; first < block.items; first += kMergeAhead * kMergeThreads) {
#pragma unroll
    for (int j = 0; j < kMergeAhead; ++j) {
      if (first + j * kMergeThreads < block.items) block.store(cells[j], values[j]);
    }
    load(first + kMergeAhead * kMergeThreads);
  }
}

}  // namespace kronafuse::cuda
