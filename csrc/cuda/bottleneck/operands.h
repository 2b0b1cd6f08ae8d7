// From views to the kernel's operands: how features are read, which factors must be packed first.
#pragma once

#include "cuda/bottleneck/arguments.h"

namespace kronafuse::cuda::bottleneck {

// Features that the kernel reads, in the fastest way that their dtype, strides and address allow.
Features features_of(const View& view, DType compute);
Features no_features();
// Whether rows of a contiguous result may be stored eight elements at a time.
bool stores_in_chunks(const View& view, DType compute);
Vector vector_of(const View* view);

// Whether the kernel reads this factor as it is.
bool is_direct(const View& factor, DType compute);
Factor direct_factor(const View& factor);
// Elements of a factor that is packed: rows of a multiple of eight.
int64_t packed_elements(const View& factor);

// Both factors as the kernel reads them, the packed ones in `packed`, by one launch where any is.
struct Factors {
  Factor down;
  Factor up;
};
Factors ready_factors(const char* op, const View& down, const View& up, DType compute, const View* packed, void* stream);

// Checks of shapes that both directions share: factors, scale, activation.
void check_factors(const char* op, const View& down, const View& up, const View* scale, int64_t activation, DType compute);
void check_contiguous(const char* op, const char* name, const View& view, int64_t rows, int64_t columns);
// A (M, H) tensor in the compute dtype that the kernel writes: contiguous, and where H is even on 4 bytes, since it
// stores two elements at a time then.
void check_written_hidden(const char* op, const char* name, const View& view, int64_t rows, int64_t width);

}  // namespace kronafuse::cuda::bottleneck
