#include "cuda/kron_linear/linear_sm90a.cuh"

#ifndef KRONAFUSE_ONE_INSTANCE
KF_HOPPER_INSTANCES(2)
#endif
