// The size of merge's blocks, for its launcher and for introspection.
#pragma once

#include "common/configs.h"

namespace kronafuse::cuda {

constexpr int kMergeThreads = 128;
// Blocks of a multiprocessor, by registers, and vectors of 16 bytes that a thread has under way at once: 40 KB of W a
// multiprocessor, about what an H200's memory takes to be busy.
constexpr int kMergeBlocks = 5;
constexpr int kMergeAhead = 4;
// Most elements of a row of B that a block holds.
constexpr int kMergeChunk = 4096;

// Of a row of B, elements of `wide_bytes`, a gap after every 16 bytes of weight: see merge.cuh.
constexpr int merge_shared_bytes(int columns, int vector, int wide_bytes) {
  return (columns + (columns - 1) / vector) * wide_bytes;
}

inline constexpr Configuration merge_configurations[] = {
    {"fp64", 1, kMergeChunk, 0, kMergeAhead, kMergeThreads, merge_shared_bytes(kMergeChunk, 2, 8)},
    {"fp32", 1, kMergeChunk, 0, kMergeAhead, kMergeThreads, merge_shared_bytes(kMergeChunk, 4, 4)},
    {"16-bit", 1, kMergeChunk, 0, kMergeAhead, kMergeThreads, merge_shared_bytes(kMergeChunk, 8, 4)},
};

}  // namespace kronafuse::cuda
