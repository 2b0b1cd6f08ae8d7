// A tensor of three dimensions as kernels take it: no more than an address and strides in elements.
#pragma once

#include <cstdint>

namespace kronafuse::cpu {

struct Operand {
  void* data;
  int64_t stride[3];
};

}  // namespace kronafuse::cpu
