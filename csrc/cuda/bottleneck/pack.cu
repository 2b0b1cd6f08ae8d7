#include "cuda/bottleneck/pack.h"

#include "cuda/bottleneck/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/vector.cuh"

namespace kronafuse::cuda::bottleneck {

namespace {

constexpr int PACK_THREADS = 256;

struct PackArguments {
  PackJob jobs[2];
};

template <class T>
__global__ void __launch_bounds__(PACK_THREADS) pack_kernel(PackArguments args) {
  const PackJob job = blockIdx.y == 0 ? args.jobs[0] : args.jobs[1];
  const int chunks = job.padded / 8;
  const int64_t total = static_cast<int64_t>(job.rows) * chunks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * PACK_THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * PACK_THREADS + threadIdx.x; i < total; i += step) {
    const int64_t row = i / chunks;
    const int column = static_cast<int>(i % chunks) * 8;
    Vec16<T> chunk;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t at = row * job.stride_row + (column + j) * job.stride_column;
      chunk[j] = from_float<T>(column + j < job.columns ? load_element(job.data, at, job.dtype) : 0.0f);
    }
    store_16(static_cast<T*>(job.target) + i * 8, chunk);
  }
}

}  // namespace

void pack(const PackJob* jobs, int count, DType dtype, Stream stream) {
  PackArguments args{};
  int64_t most = 1;
  for (int i = 0; i < count; ++i) {
    args.jobs[i] = jobs[i];
    const int64_t chunks = static_cast<int64_t>(jobs[i].rows) * (jobs[i].padded / 8);
    most = chunks > most ? chunks : most;
  }
  const int64_t blocks = (most + PACK_THREADS - 1) / PACK_THREADS;
  Launch where;
  where.grid = {static_cast<unsigned>(blocks < 4096 ? blocks : 4096), static_cast<unsigned>(count), 1};
  where.threads = PACK_THREADS;
  where.stream = stream;
  with_dtype(dtype, [&](auto tag) { launch<pack_kernel<decltype(tag)>>(where, args); });
}

}  // namespace kronafuse::cuda::bottleneck
