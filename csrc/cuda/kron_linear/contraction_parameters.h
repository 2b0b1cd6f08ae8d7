// What the kernels of a contraction are launched with.
#pragma once

#include <cstdint>

#include "common/view.h"
#include "cuda/common/divide.cuh"
#include "cuda/kron_linear/contraction.h"
#include "cuda/kron_linear/contraction_plan.h"

namespace kronafuse::cuda {

// G, by which rows are divided; 0 where rows are equally far apart in every array and no one asks for g.
struct ContractionGroup {
  int size = 0;
  Divider divider;

  ContractionGroup() = default;
  explicit ContractionGroup(int group) : size(group), divider(static_cast<uint32_t>(group)) {}
  KF_HOST_DEVICE int quotient(int row) const {
    return static_cast<int>(divider.quotient(static_cast<uint32_t>(row)));
  }
  KF_HOST_DEVICE int remainder(int row) const { return row - quotient(row) * size; }
};

// A (M, G, O) array in global memory; absent where data is null.
struct ContractionTarget {
  void* data;
  int64_t stride_m, stride_g, stride_o;
};

// A (G, K) or (G, O) array of scales; absent where data is null.
struct ContractionScales {
  const void* data;
  DType dtype;
  int64_t stride_g, stride;
};

// How the elements of a factor come into shared memory: 16 bytes at a time as they are, eight neighbours along k or
// along o through registers, or one by one.
enum class FactorReading { copied, along_k, along_o, single };

struct ContractionSlot {
  const void* factor;
  int64_t stride_o, stride_k;
  bool is_float32;
  FactorReading reading;
  int width;         // O
  int tile;          // first column tile
  int column;        // first column among the unpadded ones of all factors
  float scale;
  const void* scale_tensor;
  DType scale_dtype;
  ContractionTarget out;
  int run;  // 8, 2 or 1 neighbours of out and base lie together and aligned: values of o, or rows
};

struct ContractionParameters {
  const void* x;
  int64_t stride_m, stride_g, stride_k;
  int rows, k;  // rows = M·G
  ContractionGroup group;
  int piece;  // neighbours of x that one copy takes: 8, 4 or 2; 1: element by element
  ContractionScales in_scale;
  ContractionTarget base;
  ContractionScales out_scale;
  float* partial;  // (splits, rows, columns), null without splits
  int columns;     // Σ O
  int column_tiles;
  int count;
  ContractionSlot slots[kContractionFactors];
  ContractionPlan plan;
};

// One launch each, of a kernel for the layout of x that the name tells, and of the one that adds the splits.
void contract_k(const ContractionParameters& parameters, DType dtype, Stream stream);
void contract_rows(const ContractionParameters& parameters, DType dtype, Stream stream);
void sum_splits(const ContractionParameters& parameters, DType dtype, Stream stream);

}  // namespace kronafuse::cuda
