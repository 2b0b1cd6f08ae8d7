// The configuration tables of all kernels in one list.
#pragma once

#include "common/configs.h"
#include "cuda/bottleneck/configs.h"
#include "cuda/kron_linear/configs.h"
#include "cuda/kron_linear/configs_sm90a.h"
#include "cuda/kron_linear/contraction_configs.h"
#include "cuda/kron_linear/fat_configs_sm90a.h"
#include "cuda/kron_linear/fat_linear_configs.h"
#include "cuda/kron_linear/reduce_configs.h"
#include "cuda/kron_merge/configs.h"

namespace kronafuse {

inline constexpr ConfigurationTable configuration_tables[] = {
    configuration_table("linear", cuda::linear_configurations),
    configuration_table("linear_sm90a", cuda::linear_sm90a_configurations),
    configuration_table("fat_linear", cuda::fat_linear_configurations),
    configuration_table("fat_linear_sm90a", cuda::fat_linear_sm90a_configurations),
    configuration_table("shrink", cuda::shrink_configurations),
    configuration_table("mix", cuda::mix_configurations),
    configuration_table("reduce", cuda::reduce_configurations),
    configuration_table("merge", cuda::merge_configurations),
    configuration_table("bottleneck_forward", cuda::bottleneck_forward_configurations),
    configuration_table("bottleneck_backward", cuda::bottleneck_backward_configurations),
};

}  // namespace kronafuse
