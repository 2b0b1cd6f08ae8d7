#include "cuda/kron_linear/linear_sm90a.cuh"

KF_HOPPER_INSTANCES(0)
