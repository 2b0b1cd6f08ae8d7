// Which tiles of y a cluster computes, in which order: known to every role alike, so none has to be told.
#pragma once

#include "cuda/common/platform.cuh"

namespace kronafuse::cuda {

struct TileOrigin {
  int m;
  int n;
};

// Tiles are numbered in groups of `group` rows of clusters, down the rows first: the tiles of a wave then share few
// rows of x and few of W, and both stay in L2.
struct TileSchedule {
  int tile_m;
  int tile_n;
  int cluster;   // blocks, along M
  int clusters;  // in the grid
  int m_clusters;
  int n_tiles;
  int group;

  KF_HOST_DEVICE int count() const { return m_clusters * n_tiles; }

  KF_HOST_DEVICE TileOrigin origin(int tile, int rank) const {
    const int per_group = group * n_tiles;
    const int first = tile / per_group * group;
    const int rest = tile % per_group;
    const int rows = m_clusters - first < group ? m_clusters - first : group;
    return {((first + rest % rows) * cluster + rank) * tile_m, rest / rows * tile_n};
  }
};

}  // namespace kronafuse::cuda
