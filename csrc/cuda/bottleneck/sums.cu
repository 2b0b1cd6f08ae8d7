#include "cuda/bottleneck/sums.h"

#include "cuda/bottleneck/element.cuh"
#include "cuda/common/launch.cuh"

namespace kronafuse::cuda::bottleneck {

namespace {

constexpr int SUMS_COLUMNS = 32, SUMS_PARTS = 8, SUMS_THREADS = SUMS_COLUMNS * SUMS_PARTS;

struct SumsArguments {
  SumsJob jobs[2];
  int64_t blocks;
};

__global__ void __launch_bounds__(SUMS_THREADS) sums_kernel(SumsArguments args) {
  const SumsJob job = blockIdx.y == 0 ? args.jobs[0] : args.jobs[1];
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [SUMS_PARTS, SUMS_COLUMNS]
  const int thread = static_cast<int>(threadIdx.x), part = thread / SUMS_COLUMNS;
  const int column = static_cast<int>(blockIdx.x) * SUMS_COLUMNS + thread % SUMS_COLUMNS;
  float total = 0.0f;
  if (column < job.columns) {
#pragma unroll 8
    for (int64_t block = part; block < args.blocks; block += SUMS_PARTS) {
      total += job.partial[block * job.columns + column];
    }
  }
  shared[thread] = total;
  __syncthreads();
  if (part != 0 || column >= job.columns) return;
  for (int other = 1; other < SUMS_PARTS; ++other) total += shared[other * SUMS_COLUMNS + thread];
  const float factor = scale_of(job.scale_number, job.scale.data, job.scale.dtype);
  store_element(job.out, column * job.out_stride, job.out_dtype, total * factor);
}

}  // namespace

void sum_blocks(const SumsJob* jobs, int count, int64_t blocks, Stream stream) {
  SumsArguments args{};
  args.blocks = blocks;
  int most = 1;
  for (int i = 0; i < count; ++i) {
    args.jobs[i] = jobs[i];
    most = jobs[i].columns > most ? jobs[i].columns : most;
  }
  Launch where;
  where.grid = {static_cast<unsigned>((most + SUMS_COLUMNS - 1) / SUMS_COLUMNS), static_cast<unsigned>(count), 1};
  where.threads = SUMS_THREADS;
  where.shared_bytes = SUMS_THREADS * 4;
  where.stream = stream;
  launch<sums_kernel>(where, args);
}

}  // namespace kronafuse::cuda::bottleneck
