// What the bottleneck's kernel takes. Forward reads x through down and up; backward reads dy through up and down.
#pragma once

#include <cstdint>

#include "common/view.h"
#include "cuda/bottleneck/configs.h"

namespace kronafuse::cuda::bottleneck {

// How the kernel reads features.
enum class Reading : int {
  NONE,      // they are absent
  COPY,      // in the compute dtype, 16 bytes at a time
  CONVERT,   // in float32, 16 bytes at a time
  ELEMENTS,  // any dtype, any strides
};

// Rows of features, (M, F).
struct Features {
  const void* data;
  int64_t stride_row;
  int64_t stride_column;
  DType dtype;
  Reading reading;
};

// A factor in the compute dtype: rows 16-byte aligned, `columns` a multiple of 8 of which all may be read.
struct Factor {
  const void* data;
  int64_t stride_row;
  int rows;
  int columns;
};

// A vector of any dtype and stride; null data for none.
struct Vector {
  const void* data;
  int64_t stride;
  DType dtype;
};

struct RowsArguments {
  Features in;      // (M, F)  x, or dy
  Features added;   // (M, O)  the residual, or dy where the residual is x
  Factor first;     // down (H, K), or up (N, H)
  Factor second;    // up (N, H), or down (H, K)
  Vector in_bias;   // (H,)  forward alone
  Vector out_bias;  // (O,)  forward alone
  Vector scale;     // 0-d
  float scale_number;
  void* out;           // (M, O) contiguous: y, or dx; null for none
  void* pre;           // (M, H) contiguous: written forward, read backward; null for none
  void* hidden;        // (M, H) contiguous, backward alone: act(pre); null for none
  void* dpre;          // (M, H) contiguous, backward alone; null for none
  float* in_sums;      // (blocks of rows, F), backward alone: column sums of dy; null for none
  float* hidden_sums;  // (blocks of rows, H), backward alone: column sums of dpre; null for none
  int64_t tokens;
  int in_features;
  int width;
  int out_features;
  int split_columns;  // columns of the result that a block computes, a multiple of COLUMNS
  int splits;
  int width_chunks_log2;  // 2^this threads load a row along the hidden layer
  int activation;
  DType out_dtype;
  bool out_vectors;  // rows of the result may be stored 16 bytes at a time
  bool reads_pre;    // backward alone: whether anything is asked for that the pre-activation goes into
  bool pre_vectors;  // its rows may be read 16 bytes at a time
  bool product;      // whether anything asks for the product into the hidden layer
  SharedLayout layout;
};

}  // namespace kronafuse::cuda::bottleneck
