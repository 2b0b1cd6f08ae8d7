// Rules that both directions share; what would be unsafe to skip.
#pragma once

#include "common/view.h"

namespace kronafuse::cpu::bottleneck {

constexpr int64_t kActivations = 5;

void check_factors(const char* op, const View& down, const View& up, const View* scale, int64_t activation,
                   DType compute);
// (rows, columns), or (rows) where columns is -1.
void check_shape(const char* op, const char* name, const View& view, int64_t rows, int64_t columns);
void check_contiguous(const char* op, const char* name, const View& view, int64_t rows, int64_t columns);
// An output shares no memory with an input.
void check_apart(const char* op, const char* name, const View& output, const char* other, const View& input);

}  // namespace kronafuse::cpu::bottleneck
