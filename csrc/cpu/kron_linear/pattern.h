// A short row repeated until it fills whole vectors: against whole tokens, whose rows are no multiple of a vector, no
// lane is lost. For kernel files alone, as vector.h.
#pragma once

#include "cpu/common/vector.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {

// Vectors after which a row of this many columns repeats: columns / gcd(columns, lanes).
KF_INLINE int64_t pattern_vectors(int64_t columns) {
  int64_t a = columns, b = kLanes;
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return columns / a;
}

// row[0 .. columns) repeated up to `vectors` vectors.
KF_INLINE void repeat(float* row, int64_t columns, int64_t vectors) {
  for (int64_t c = columns; c < vectors * kLanes; ++c) row[c] = row[c - columns];
}

// row[c] = Σ_s row[s · columns + c]: the repeats added up.
KF_INLINE void fold_repeats(float* row, int64_t columns, int64_t vectors) {
  for (int64_t first = columns; first < vectors * kLanes; first += columns) {
    for (int64_t c = 0; c < columns; ++c) row[c] += row[first + c];
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
