// out = base + out_scale ⊙ s · Σ over the splits, in their order: the second stage of a contraction split over k.
#include "cuda/common/launch.cuh"
#include "cuda/kron_linear/contraction.cuh"

namespace kronafuse::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) contraction_sum_kernel(ContractionParameters p) {
  const int64_t elements = static_cast<int64_t>(p.rows) * p.columns;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += step) {
    float sum = 0.0f;
    for (int split = 0; split < p.plan.splits; ++split) sum += p.partial[split * elements + i];
    const int row = static_cast<int>(i / p.columns);
    const int column = static_cast<int>(i - static_cast<int64_t>(row) * p.columns);
    int index = 0;
    while (index + 1 < p.count && column >= p.slots[index + 1].column) ++index;
    const ContractionSlot& slot = p.slots[index];
    const int own = column - slot.column;
    float value = sum * scale_value(slot.scale, slot.scale_tensor, slot.scale_dtype);
    if (p.out_scale.data != nullptr) value *= scale_at(p.out_scale, p.group.remainder(row), own);
    const auto offset = [&](const ContractionTarget& target) {
      return row_offset(p.group, row, target.stride_m, target.stride_g) + own * target.stride_o;
    };
    if (p.base.data != nullptr) value += to_float(static_cast<const T*>(p.base.data)[offset(p.base)]);
    // Rounding point 1: T contains the scale.
    static_cast<T*>(slot.out.data)[offset(slot.out)] = from_float<T>(value);
  }
}

template <class T>
void launch_sum(const ContractionParameters& p, Stream stream) {
  const int64_t elements = static_cast<int64_t>(p.rows) * p.columns;
  const int64_t blocks = (elements + kThreads - 1) / kThreads, most = int64_t{device_info().multiprocessors} * 8;
  const Dim3 grid{static_cast<unsigned>(blocks < most ? blocks : most), 1, 1};
  launch<contraction_sum_kernel<T>>({grid, kThreads, 0, stream}, p);
}

}  // namespace

void sum_splits(const ContractionParameters& parameters, DType dtype, Stream stream) {
#ifdef KRONAFUSE_ONE_INSTANCE
  KF_CHECK(dtype == DType::bf16, "this build has one instance of each kernel, for bfloat16; got ", dtype);
  launch_sum<bf16>(parameters, stream);
#else
  with_dtype(dtype, [&](auto element) { launch_sum<decltype(element)>(parameters, stream); });
#endif
}

}  // namespace kronafuse::cuda
