// Which operands of a call TMA can read, and as what: decided by strides and addresses alone, before a tile is chosen.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>

#include "cuda/common/tma.cuh"
#include "cuda/kron_linear/sm90a/problem.cuh"

namespace kronafuse::cuda::hopper {

constexpr int64_t kMaximumSize = int64_t{1} << 30;  // of M, N and K: coordinates are int, also one tile beyond the end

// A matrix as TMA reads it: rows of `inner` adjacent elements.
struct Rows {
  void* data;
  DType dtype;
  int64_t inner;
  int64_t outer;
  int64_t pitch;  // elements
};

inline int64_t padded(int64_t size) { return (size + 7) / 8 * 8; }

// The distance between the rows of a dimension of this size and stride; of a single row nobody steps over it.
inline int64_t pitch_of(int64_t size, int64_t stride, int64_t reach) { return size == 1 ? padded(reach) : stride; }

inline bool serves(const Rows& rows) {
  const TensorExtent extents[2] = {{rows.inner, 2, 8}, {rows.outer, rows.pitch * 2, 8}};
  return rows.inner <= kMaximumSize && rows.outer <= kMaximumSize && rows.pitch >= rows.inner &&
         tensor_map_serves(rows.data, rows.dtype, 2, extents, Swizzle::none);
}

// The matrix with its dimension `inner` adjacent; nothing where it is not, or TMA cannot read it.
inline std::optional<Rows> rows_of(const View& matrix, int inner) {
  const int outer = 1 - inner;
  if (matrix.stride[inner] != 1 && matrix.size[inner] != 1) return std::nullopt;
  const Rows rows{matrix.data, matrix.dtype, matrix.size[inner], matrix.size[outer],
                  pitch_of(matrix.size[outer], matrix.stride[outer], matrix.size[inner])};
  return serves(rows) ? std::optional<Rows>(rows) : std::nullopt;
}

// A and B of one segment before a tile is chosen.
struct Pair {
  Rows a;
  int64_t a_blocks = 1;  // the middle dimension of A
  int64_t a_block_pitch = 0;
  Rows b;
  int64_t width;
  int64_t period;  // features of one of A's blocks
};

// How many of A's blocks a tile touches at most, wherever the tiles begin: at multiples of their own width.
inline int64_t passes_of(const Pair& pair, int tile_n) {
  if (pair.a_blocks == 1) return 1;
  const int64_t latest = pair.period - std::gcd(pair.period, int64_t{tile_n});
  return std::min((latest + tile_n - 1) / pair.period + 1, pair.a_blocks);
}

// The products of a call, in the order of the K loop.
struct Operands {
  Pair pairs[kSegments];
  int count = 0;
  bool transposed = false;
  int64_t n = 0;

  bool add(const View& a, const View& b) {
    const std::optional<Rows> a_rows = rows_of(a, 1), b_rows = rows_of(b, transposed ? 0 : 1);
    if (!a_rows || !b_rows) return false;
    return add(Pair{*a_rows, 1, a_rows->pitch, *b_rows, a.size[1], n});
  }

  bool add(const BlockTail& tail) {
    const View& inner = tail.inner;
    if (tail.out_scale || tail.up.dtype != inner.dtype) return false;
    if (inner.stride[2] != 1 && inner.size[2] != 1) return false;
    const int64_t n1_pitch = pitch_of(inner.size[1], inner.stride[1], inner.size[2]);
    const int64_t reach = (inner.size[1] - 1) * n1_pitch + inner.size[2];
    const Rows a{inner.data, inner.dtype, reach, inner.size[0], pitch_of(inner.size[0], inner.stride[0], reach)};
    const std::optional<Rows> b = rows_of(tail.up, transposed ? 0 : 1);
    if (!b || !serves(a) || n1_pitch % 8 != 0 || n1_pitch < inner.size[2]) return false;
    return add(Pair{a, inner.size[1], n1_pitch, *b, inner.size[2], tail.up.size[0]});
  }

  bool add(const Pair& pair) {
    pairs[count++] = pair;
    return true;
  }

  // Pieces of this length that a tile multiplies, in all segments and passes.
  int64_t pieces(int length, int tile_n) const {
    int64_t found = 0;
    for (int i = 0; i < count; ++i) {
      found += passes_of(pairs[i], tile_n) * ((pairs[i].width + length - 1) / length);
    }
    return found;
  }
};

// Every product of the call, all of one orientation of W and L; nothing where there are none or TMA cannot read one.
inline std::optional<Operands> operands_of(const LinearArguments& arguments, bool transposed) {
  Operands operands;
  operands.transposed = transposed;
  operands.n = arguments.y.size[1];
  if (arguments.weight && arguments.weight->size[1] > 0 && !operands.add(*arguments.x, *arguments.weight)) {
    return std::nullopt;
  }
  for (int i = 0; i < arguments.dense_count; ++i) {
    const DenseTail& tail = arguments.dense[i];
    if (tail.t.size[1] > 0 && !operands.add(tail.t, tail.up)) return std::nullopt;
  }
  if (arguments.block && arguments.block->inner.size[2] > 0 && !operands.add(*arguments.block)) return std::nullopt;
  return operands.count > 0 ? std::optional<Operands>(operands) : std::nullopt;
}

}  // namespace kronafuse::cuda::hopper
