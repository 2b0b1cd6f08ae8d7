// Tiles in shared memory: rows of 16-byte chunks, permuted so that ldmatrix meets no bank twice, and how they are filled.
#pragma once

#include "cuda/bottleneck/arguments.h"
#include "cuda/bottleneck/element.cuh"
#include "cuda/common/async.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/vector.cuh"

namespace kronafuse::cuda::bottleneck {

// Rows of STEP elements: two rows fill the 32 banks.
KF_DEVICE int step_chunk(int row, int chunk) { return row * STEP * 2 + ((chunk ^ ((row >> 1) & 3)) << 4); }

// Rows of a multiple of 64 elements.
KF_DEVICE int row_chunk(int row, int chunk, int pitch) { return row * pitch * 2 + ((chunk ^ (row & 7)) << 4); }

constexpr int STEP_CHUNKS = STEP / 8;
constexpr int STEP_CHUNKS_LOG2 = 2, COLUMN_CHUNKS_LOG2 = 3;

// Rows row0... and `chunks` chunks from column0 of a factor, zeros outside of it. `place(row, chunk)` is in bytes.
template <class T, int THREADS, class Place>
KF_DEVICE void load_factor_tile(unsigned char* tile, const Factor& factor, int row0, int rows, int column0, int chunks,
                                int chunks_log2, Place place) {
  const int thread = static_cast<int>(threadIdx.x), chunk = thread & ((1 << chunks_log2) - 1);
  const int column = column0 + chunk * 8;
  if (chunk >= chunks) return;
  const T* source = static_cast<const T*>(factor.data) + column;
  for (int row = thread >> chunks_log2; row < rows; row += THREADS >> chunks_log2) {
    const bool valid = row0 + row < factor.rows && column < factor.columns;
    cp_async_16(tile + place(row, chunk), source + (row0 + row) * factor.stride_row, valid);
  }
}

// Features column0... of a block's rows: 16-bit ones go straight into the tile, float32 ones as they are into `raw`.
template <class T, int BLOCK_M, int THREADS>
KF_DEVICE void start_features(unsigned char* tile, unsigned char* raw, const Features& in, int64_t row0, int64_t tokens,
                              int column0, int features) {
  if (in.reading == Reading::ELEMENTS) return;
  for (int i = static_cast<int>(threadIdx.x); i < BLOCK_M * STEP_CHUNKS; i += THREADS) {
    const int row = i / STEP_CHUNKS, chunk = i % STEP_CHUNKS, column = column0 + chunk * 8;
    const bool valid = row0 + row < tokens && column < features;
    const int64_t offset = (row0 + row) * in.stride_row + column;
    if (in.reading == Reading::COPY) {
      cp_async_16(tile + step_chunk(row, chunk), static_cast<const T*>(in.data) + offset, valid);
    } else {
      const float* source = static_cast<const float*>(in.data) + offset;
      cp_async_16(raw + i * 32, source, valid);
      cp_async_16(raw + i * 32 + 16, source + 4, valid);
    }
  }
}

template <class T>
KF_DEVICE Vec16<T> rounded(const float (&value)[8]) {
  Words4 words;
#pragma unroll
  for (int i = 0; i < 4; ++i) words.word[i] = pack2<T>(value[2 * i], value[2 * i + 1]);
  return vec16_of_words<T>(words);
}

// The rest of start_features, once its copies have landed: each thread rounds the chunks that it asked for itself, so
// that no barrier is needed between. Features in single elements are read here.
template <class T, int BLOCK_M, int THREADS>
KF_DEVICE void finish_features(unsigned char* tile, const unsigned char* raw, const Features& in, int64_t row0,
                               int64_t tokens, int column0, int features) {
  if (in.reading == Reading::COPY) return;
  for (int i = static_cast<int>(threadIdx.x); i < BLOCK_M * STEP_CHUNKS; i += THREADS) {
    const int row = i / STEP_CHUNKS, chunk = i % STEP_CHUNKS, column = column0 + chunk * 8;
    float value[8];
    if (in.reading == Reading::CONVERT) {
      const Vec16<float> low = load_16<float>(raw + i * 32), high = load_16<float>(raw + i * 32 + 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        value[j] = low[j];
        value[j + 4] = high[j];
      }
    } else {
      const int64_t offset = (row0 + row) * in.stride_row;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const bool valid = row0 + row < tokens && column + j < features;
        value[j] = valid ? load_element(in.data, offset + (column + j) * in.stride_column, in.dtype) : 0.0f;
      }
    }
    store_16(tile + step_chunk(row, chunk), rounded<T>(value));
  }
}

// Fragments of B for 16 k and 16 columns: b[j] is that of columns 8j. The first k and the first column are multiples of 16.
// The tile's rows are columns of B and its chunks lie along k.
template <class Place>
KF_DEVICE void fragments_of_rows(uint32_t (&b)[2][2], const unsigned char* tile, int k, int column, Place place) {
  const int at = static_cast<int>(threadIdx.x) % 32;
  uint32_t r[4];
  ldmatrix_x4(r, tile + place(column + (at & 7) + (at >> 4) * 8, k / 8 + ((at >> 3) & 1)));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// The tile's rows are k and its chunks lie along the columns of B.
template <class Place>
KF_DEVICE void fragments_of_columns(uint32_t (&b)[2][2], const unsigned char* tile, int k, int column, Place place) {
  const int at = static_cast<int>(threadIdx.x) % 32;
  uint32_t r[4];
  ldmatrix_x4_trans(r, tile + place(k + (at & 15), column / 8 + (at >> 4)));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// Fragment of A: rows row... and 16 k of a tile whose chunks lie along k.
template <class Place>
KF_DEVICE void fragment_of_a(uint32_t (&a)[4], const unsigned char* tile, int row, int k, Place place) {
  const int at = static_cast<int>(threadIdx.x) % 32;
  ldmatrix_x4(a, tile + place(row + (at & 15), k / 8 + (at >> 4)));
}

// Waits until the oldest of `stages` - 1 groups has landed.
KF_DEVICE void wait_for_oldest(int stages) {
  if (stages >= 4) {
    cp_async_wait<2>();
  } else if (stages == 3) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
}

}  // namespace kronafuse::cuda::bottleneck
