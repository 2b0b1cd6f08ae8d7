// Into shared memory: tiles of x, each warp its own and ahead of time, and the factors for the whole block.
#pragma once

#include "cuda/common/async.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/kron_linear/contraction.cuh"

namespace kronafuse::cuda {

// Copies of Piece elements.
template <int Piece>
KF_DEVICE void copy_piece(void* shared, const void* global, bool valid) {
  if constexpr (Piece == 8) {
    cp_async_16(shared, global, valid);
  } else if constexpr (Piece == 4) {
    cp_async_8(shared, global, valid);
  } else {
    cp_async_4(shared, global, valid);
  }
}

// A tile [row][k]: rows of tile_k values. Neighbouring lanes take neighbouring pieces of one row.
template <class Traits, int Piece>
KF_DEVICE void copy_tile_k(const ContractionParameters& p, unsigned char* stage, int first_row, int first_k) {
  using T = typename Traits::T;
  constexpr int kLanesPerRow = Piece == 8 ? 8 : Piece == 4 ? 16 : 32;
  constexpr int kStep = 32 / kLanesPerRow;
  const T* x = static_cast<const T*>(p.x);
  const int own_row = lane() / kLanesPerRow;
#pragma unroll 1
  for (int at = lane() % kLanesPerRow * Piece; at < p.plan.tile_k; at += kLanesPerRow * Piece) {
    const bool inside = first_k + at < p.k;
    const T* source = x + (inside ? first_k + at : 0);
    unsigned char* target = stage + own_row * p.plan.x_pitch + at * 2;
    int row = first_row + own_row;
    int64_t offset = row * p.stride_g;
#pragma unroll 4
    for (int i = 0; i < Traits::kRows / kStep; ++i) {
      const bool valid = inside && row < p.rows;
      if (p.group.size != 0) offset = row_offset(p.group, row, p.stride_m, p.stride_g);
      copy_piece<Piece>(target, valid ? source + offset : x, valid);
      offset += kStep * p.stride_g;
      target += kStep * p.plan.x_pitch;
      row += kStep;
    }
  }
}

// Lines of a tile [k][row] that are copied; those below a single tile's stay as `clear_stages` left them.
KF_DEVICE int lines_of_tile(const ContractionParameters& p) { return p.plan.tiles == 1 ? p.k : p.plan.tile_k; }

// Zeros below the values of k that there are.
template <class Traits>
KF_DEVICE void clear_stages(const ContractionParameters& p, unsigned char* stages) {
  constexpr int kChunks = Traits::kRows / 8;
  const int lines = p.plan.tile_k - lines_of_tile(p);
#pragma unroll 1
  for (int i = lane(); i < p.plan.stages * lines * kChunks; i += 32) {
    const int line = i / kChunks, stage = line / lines;
    store_16(stages + stage * p.plan.stage_bytes + (p.k + line - stage * lines) * p.plan.x_pitch + i % kChunks * 16,
             Vec16<uint32_t>{});
  }
}

// A tile [k][row]: lines of kRows neighbouring rows.
template <class Traits, int Piece>
KF_DEVICE void copy_tile_rows(const ContractionParameters& p, unsigned char* stage, int first_row, int first_k) {
  using T = typename Traits::T;
  constexpr int kPieces = Traits::kRows / Piece;
  constexpr int kStep = 32 / kPieces;
  static_assert(kPieces <= 32, "a line is one instruction at most");
  const T* x = static_cast<const T*>(p.x);
  const int column = lane() % kPieces * Piece, own_line = lane() / kPieces;
  const int there = first_row + column < p.rows ? p.k - first_k : 0;  // values of k
  const T* source = x;
  if (there > 0) {
    source += row_offset(p.group, first_row + column, p.stride_m, p.stride_g) + (first_k + own_line) * p.stride_k;
  }
  unsigned char* target = stage + own_line * p.plan.x_pitch + column * 2;
  const int lines = lines_of_tile(p);
#pragma unroll 4
  for (int line = own_line; line < lines; line += kStep) {
    copy_piece<Piece>(target, line < there ? source : x, line < there);
    source += kStep * p.stride_k;
    target += kStep * p.plan.x_pitch;
  }
}

// Either tile in any strides, two elements of a line of shared memory at a time.
template <class Traits>
KF_DEVICE void load_tile(const ContractionParameters& p, unsigned char* stage, int first_row, int first_k) {
  using T = typename Traits::T;
  const T* x = static_cast<const T*>(p.x);
  const auto element = [&](int row, int k) {
    if (first_row + row >= p.rows || first_k + k >= p.k) return T{0};
    return x[row_offset(p.group, first_row + row, p.stride_m, p.stride_g) + (first_k + k) * p.stride_k];
  };
  const int lines = Traits::kRowsTogether ? p.plan.tile_k : Traits::kRows;
  const int pairs = (Traits::kRowsTogether ? Traits::kRows : p.plan.tile_k) / 2;
#pragma unroll 1
  for (int i = lane(); i < lines * pairs; i += 32) {
    const int line = i / pairs, at = (i - line * pairs) * 2;
    const uint32_t packed = Traits::kRowsTogether ? pack2<T>(element(at, line), element(at + 1, line))
                                                  : pack2<T>(element(line, at), element(line, at + 1));
    *reinterpret_cast<uint32_t*>(stage + line * p.plan.x_pitch + at * 2) = packed;
  }
}

// Asks for one tile of x; it is there when this warp has waited for the group.
template <class Traits>
KF_DEVICE void request_tile(const ContractionParameters& p, unsigned char* stage, int first_row, int first_k) {
  if constexpr (Traits::kRowsTogether) {
    if (p.piece == 8) return copy_tile_rows<Traits, 8>(p, stage, first_row, first_k);
    if (p.piece == 4) return copy_tile_rows<Traits, 4>(p, stage, first_row, first_k);
    if (p.piece == 2) return copy_tile_rows<Traits, 2>(p, stage, first_row, first_k);
  } else {
    if (p.piece == 8) return copy_tile_k<Traits, 8>(p, stage, first_row, first_k);
    if (p.piece == 4) return copy_tile_k<Traits, 4>(p, stage, first_row, first_k);
    if (p.piece == 2) return copy_tile_k<Traits, 2>(p, stage, first_row, first_k);
  }
  load_tile<Traits>(p, stage, first_row, first_k);
}

// in_scale ⊙ a tile that has come, in place.
template <class Traits>
KF_DEVICE void scale_tile(const ContractionParameters& p, unsigned char* stage, int first_row, int first_k) {
  using T = typename Traits::T;
  const int lines = Traits::kRowsTogether ? p.plan.tile_k : Traits::kRows;
  const int length = Traits::kRowsTogether ? Traits::kRows : p.plan.tile_k;
#pragma unroll 1
  for (int i = lane(); i < lines * length; i += 32) {
    const int line = i / length, at = i - line * length;
    const int row = first_row + (Traits::kRowsTogether ? at : line), k = first_k + (Traits::kRowsTogether ? line : at);
    if (row >= p.rows || k >= p.k) continue;
    T& element = *reinterpret_cast<T*>(stage + line * p.plan.x_pitch + at * 2);
    // Rounding point 0: the scaled input is rounded as x itself was.
    element = from_float<T>(to_float(element) * scale_at(p.in_scale, p.group.remainder(row), k));
  }
  sync_warp();
}

// The columns of a block that a factor has: rows `row` and following of it, kept from `shared` on.
struct FactorPart {
  unsigned char* shared;
  int row, count;
};

template <class Traits>
KF_DEVICE FactorPart part_of(const ContractionParameters& p, const ContractionSlot& slot, unsigned char* shared) {
  constexpr int kColumns = Traits::kColumnTiles * 8;
  const int first = static_cast<int>(blockIdx.y) * kColumns, offset = slot.tile * 8 - first;
  const int begin = offset > 0 ? offset : 0;
  const int end = offset + slot.width < kColumns ? offset + slot.width : kColumns;
  return {shared + begin * p.plan.factor_pitch, begin - offset, end - begin};
}

// Asks for the factors that are there as they are needed. Columns beside the factors' are left alone, here and below:
// nothing of what they give is stored.
template <class Traits>
KF_DEVICE void copy_factors(const ContractionParameters& p, unsigned char* shared, int first_k, int length) {
  using T = typename Traits::T;
  const int chunks = length / 8;
#pragma unroll 1
  for (int index = 0; index < p.count; ++index) {
    const ContractionSlot& slot = p.slots[index];
    if (slot.reading != FactorReading::copied) continue;
    const FactorPart part = part_of<Traits>(p, slot, shared);
    const T* source = static_cast<const T*>(slot.factor);
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x); i < part.count * chunks; i += kContractionThreads) {
      const int column = i / chunks, chunk = i - column * chunks, k = first_k + chunk * 8;
      const T* own = k < p.k ? source + (part.row + column) * slot.stride_o + k : source;
      cp_async_16(part.shared + column * p.plan.factor_pitch + chunk * 16, own, k < p.k);
    }
  }
  cp_async_commit();
}

// Eight neighbours of a factor in its own dtype, as T holds them.
template <class T, class F>
KF_DEVICE Vec16<T> read_eight(const F* source) {
  if constexpr (sizeof(F) == 2) {
    return load_16<T>(source);
  } else {
    const Vec16<float> low = load_16<float>(source), high = load_16<float>(source + 4);
    Vec16<T> eight;
#pragma unroll
    for (int i = 0; i < 8; ++i) eight[i] = from_float<T>(i < 4 ? low[i & 3] : high[i & 3]);
    return eight;
  }
}

// A factor whose eight neighbours are values of k (to be rounded), or columns (to be turned), or that has none.
template <class Traits, class F>
KF_DEVICE void read_factor(const ContractionParameters& p, const ContractionSlot& slot, const FactorPart& part,
                           int first_k, int length) {
  using T = typename Traits::T;
  const F* source = static_cast<const F*>(slot.factor) + part.row * slot.stride_o + first_k * slot.stride_k;
  const int pitch = p.plan.factor_pitch, thread = static_cast<int>(threadIdx.x);
  if (slot.reading == FactorReading::along_k) {
    const int chunks = length / 8;
#pragma unroll 2
    for (int i = thread; i < part.count * chunks; i += kContractionThreads) {
      const int column = i / chunks, k = (i - column * chunks) * 8;
      Vec16<T> eight = {};
      if (first_k + k < p.k) eight = read_eight<T>(source + column * slot.stride_o + k);
      store_16(part.shared + column * pitch + k * 2, eight);
    }
  } else if (slot.reading == FactorReading::along_o) {
    const int chunks = part.count / 8;
#pragma unroll 2
    for (int i = thread; i < length * chunks; i += kContractionThreads) {
      const int k = i / chunks, column = (i - k * chunks) * 8;
      Vec16<T> eight = {};
      if (first_k + k < p.k) eight = read_eight<T>(source + k * slot.stride_k + column);
#pragma unroll
      for (int j = 0; j < 8; ++j) *reinterpret_cast<T*>(part.shared + (column + j) * pitch + k * 2) = eight[j];
    }
  } else {
    const bool along_k = slot.stride_k <= slot.stride_o;
#pragma unroll 4
    for (int i = thread; i < part.count * length; i += kContractionThreads) {
      const int line = i / (along_k ? length : part.count), at = i - line * (along_k ? length : part.count);
      const int column = along_k ? line : at, k = along_k ? at : line;
      float value = 0.0f;
      if (first_k + k < p.k) value = to_float(source[column * slot.stride_o + k * slot.stride_k]);
      *reinterpret_cast<T*>(part.shared + column * pitch + k * 2) = from_float<T>(value);
    }
  }
}

// The factors that cannot be copied. Rounding point 0: one of another dtype.
template <class Traits>
KF_DEVICE void read_factors(const ContractionParameters& p, unsigned char* shared, int first_k, int length) {
#pragma unroll 1
  for (int index = 0; index < p.count; ++index) {
    const ContractionSlot& slot = p.slots[index];
    if (slot.reading == FactorReading::copied) continue;
    const FactorPart part = part_of<Traits>(p, slot, shared);
    if (slot.is_float32) {
      read_factor<Traits, float>(p, slot, part, first_k, length);
    } else {
      read_factor<Traits, typename Traits::T>(p, slot, part, first_k, length);
    }
  }
}

// Until at most `pending` of the thread's groups of copies are on their way; the instruction takes a constant.
KF_DEVICE void wait_for_copies(int pending) {
  switch (pending) {
    case 0: return cp_async_wait<0>();
    case 1: return cp_async_wait<1>();
    case 2: return cp_async_wait<2>();
    case 3: return cp_async_wait<3>();
    case 4: return cp_async_wait<4>();
    case 5: return cp_async_wait<5>();
    case 6: return cp_async_wait<6>();
    default: return cp_async_wait<7>();
  }
}

}  // namespace kronafuse::cuda
