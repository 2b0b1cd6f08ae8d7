#include "cuda/kron_linear/fat_linear_sm90a.cuh"

KF_FAT_HOPPER_INSTANCES(192)
