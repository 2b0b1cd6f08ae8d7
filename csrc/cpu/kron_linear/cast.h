// A factor in another dtype.
#pragma once

#include "common/view.h"

namespace kronafuse::cpu {

// out (R, C) = source (R, C), each in any of the dtypes and with any strides, rounded once; they share no memory.
void cast(const View& source, const View& out);

}  // namespace kronafuse::cpu
