// The plain form of the GEMM with tails, for every architecture from sm_80 on.
#include "cuda/kron_linear/linear.h"

#include "cuda/common/launch.cuh"
#include "cuda/kron_linear/configs.h"
#include "cuda/kron_linear/plain/epilogue.cuh"
#include "cuda/kron_linear/plain/load.cuh"
#include "cuda/kron_linear/plain/multiply.cuh"

namespace kronafuse::cuda {
namespace plain {

// Traits: the rows of linear_configurations.
template <class T, int Config, bool TransposedB>
struct TraitsOf;
template <class T, bool TransposedB>
struct TraitsOf<T, 0, TransposedB> {
  using Type = Traits<T, 128, 128, 32, 3, 2, 2, TransposedB>;
};
template <class T, bool TransposedB>
struct TraitsOf<T, 1, TransposedB> {
  using Type = Traits<T, 64, 64, 64, 3, 2, 2, TransposedB>;
};

struct Arguments {
  Work work;
  Output output;
  int blocks_m = 0, blocks_n = 0;
  int group_m = 1;  // rows of tiles before the next column, so that neighbours share W in cache
};

// Kernel: one tile a block.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    linear_kernel(const __grid_constant__ Arguments arguments) {
  unsigned char* shared = dynamic_shared();
  const int tile = blockIdx.x;
  const int band_tiles = arguments.group_m * arguments.blocks_n;
  const int band = tile / band_tiles, inside = tile % band_tiles;
  const int left_m = arguments.blocks_m - band * arguments.group_m;
  const int rows = left_m < arguments.group_m ? left_m : arguments.group_m;
  const int first_m = (band * arguments.group_m + inside % rows) * Traits::kTileM;
  const int first_n = inside / rows * Traits::kTileN;

  const Work& work = arguments.work;
  const Output& output = arguments.output;
  Producer<Traits> producer(work, shared, first_m, first_n, threadIdx.x);
  const Consumer<Traits> consumer(lane(), warp_index());
  const Epilogue<Traits> epilogue(work, output, shared, first_m, first_n, consumer);
  const int steps = producer.steps();
  const int scaled_steps = output.block_scale.data != nullptr ? producer.block_steps() : -1;

  Accumulators<Traits> acc = {};
#pragma unroll 1
  for (int stage = 0; stage < Traits::kStages - 1; ++stage) {
    if (stage < steps) producer.load(stage);
    cp_async_commit();
  }
  int stage = 0, next_stage = Traits::kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    // This step's tiles have landed, and all warps are done with the stage that is filled next.
    cp_async_wait<Traits::kStages - 2>();
    __syncthreads();
    if (step + Traits::kStages - 1 < steps) producer.load(next_stage);
    cp_async_commit();
    if (step == scaled_steps) {
      epilogue.stage(output.block_scale, threadIdx.x);
      epilogue.multiply(acc);
    }
    consumer.multiply(shared + stage * Traits::kStageBytes, acc);
    stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
    next_stage = next_stage + 1 == Traits::kStages ? 0 : next_stage + 1;
  }
  if (steps == scaled_steps) {
    epilogue.stage(output.block_scale, threadIdx.x);
    epilogue.multiply(acc);
  }

  if (output.bias.data != nullptr) {
    epilogue.stage(output.bias, threadIdx.x);
    epilogue.add(acc);
  }
  const bool scaled = output.pointwise_scale.data != nullptr;
  if (scaled) epilogue.stage(output.pointwise_scale, threadIdx.x);
  // The slabs take the place of the stages.
  cp_async_wait<0>();
  __syncthreads();
  epilogue.store(acc, warp_index(), scaled);
}

// Launch.
template <class T, int Config, bool TransposedB>
void launch_linear(Arguments arguments, Stream stream) {
  using Traits = typename TraitsOf<T, Config, TransposedB>::Type;
  constexpr Configuration config = linear_configurations[Config];
  static_assert(config.tile_m == Traits::kTileM && config.tile_n == Traits::kTileN && config.tile_k == Traits::kTileK &&
                    config.stages == Traits::kStages && config.threads == Traits::kThreads,
                "the table says what is built");
  static_assert(config.shared_bytes == Epilogue<Traits>::kSharedBytes, "and how much it shares");
  const auto blocks = [](int size, int tile) { return (size + tile - 1) / tile; };
  arguments.blocks_m = blocks(arguments.work.tokens, Traits::kTileM);
  arguments.blocks_n = blocks(arguments.work.columns.count, Traits::kTileN);
  arguments.group_m = 8;
  const int64_t tiles = static_cast<int64_t>(arguments.blocks_m) * arguments.blocks_n;
  KF_CHECK(tiles < (int64_t{1} << 31), "linear: tiles of y must number under 2^31; got ", tiles);
  const Launch how{Dim3{static_cast<unsigned>(tiles), 1, 1}, Traits::kThreads, config.shared_bytes, stream};
  launch<linear_kernel<Traits>>(how, arguments);
}

template <class T>
void launch_config(int config, bool transposed, const Arguments& arguments, Stream stream) {
#ifndef KRONAFUSE_ONE_INSTANCE
  if (config == 0) {
    transposed ? launch_linear<T, 0, true>(arguments, stream) : launch_linear<T, 0, false>(arguments, stream);
    return;
  }
#endif
  transposed ? launch_linear<T, 1, true>(arguments, stream) : launch_linear<T, 1, false>(arguments, stream);
}

// Typed entry: which operands are copied by whole chunks, and the arguments as the kernel takes them.
bool aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; }

bool whole_chunks(int64_t elements) { return elements % 8 == 0; }

// Rows of neighbours along k; `rows` and `k` are dimensions of the view.
Operand operand(const View& view, int row, int k, DType dtype, bool transposed) {
  Operand result{view.data, view.stride[row], view.stride[k], view.dtype == DType::f32, false};
  const int along = transposed ? row : k, across = transposed ? k : row;
  result.copied = view.dtype == dtype && aligned(view) && view.stride[along] == 1 && whole_chunks(view.size[along]) &&
                  (view.size[across] <= 1 || whole_chunks(view.stride[across]));
  return result;
}

Values values(const std::optional<View>& view) {
  return view ? Values{view->data, view->dtype, view->stride[0]} : Values{};
}

Plane plane(const View& view, bool permuted) {
  const bool vectors = !permuted && aligned(view) && view.stride[1] == 1 && whole_chunks(view.size[1]) &&
                       (view.size[0] <= 1 || whole_chunks(view.stride[0]));
  return {view.data, view.stride[0], view.stride[1], vectors};
}

// Features are neighbours in memory: W of dx, L of a factor seen transposed.
bool by_features(const View& view) { return view.stride[0] == 1 && view.stride[1] != 1 && view.size[0] > 1; }

bool transposed_operands(const LinearArguments& arguments) {
  if (arguments.weight) return by_features(*arguments.weight);
  if (arguments.dense_count > 0) return by_features(arguments.dense[0].up);
  return arguments.block && by_features(arguments.block->up);
}

// I ⊗ B of few rows: a matrix product takes a step over k for each n1 that the tile touches. A step of 16 takes about
// twice the time of one multiply-add for every element of the tile.
bool multiply_adds_pay(const BlockTail& block) {
  constexpr int64_t tile = 64;
  const int64_t right = block.up.size[0], rank = block.up.size[1];
  return rank <= (tile / right + 1) * ((rank + 15) / 16);
}

Pointwise pointwise(const BlockTail& block) {
  const View &inner = block.inner, &up = block.up;
  return {inner.data, inner.stride[0], inner.stride[1], 0, inner.stride[2], up.data, up.dtype == DType::f32,
          0, up.stride[0], up.stride[1], static_cast<int>(up.size[1]), false};
}

Pointwise pointwise(const MixTail& mix) {
  const View &inner = mix.inner, &left = mix.left;
  const bool vectors = aligned(inner) && inner.stride[2] == 1 && whole_chunks(inner.size[2]) &&
                       (inner.size[0] <= 1 || whole_chunks(inner.stride[0])) &&
                       (inner.size[1] <= 1 || whole_chunks(inner.stride[1]));
  return {inner.data, inner.stride[0], 0, inner.stride[2], inner.stride[1], left.data, left.dtype == DType::f32,
          left.stride[0], 0, left.stride[1], static_cast<int>(left.size[1]), vectors};
}

void add_segment(Work& work, const View& a, const View& b, DType dtype, bool transposed) {
  Segment& segment = work.segments[work.count++];
  segment.a = operand(a, 0, 1, dtype, false);
  segment.b = operand(b, 0, 1, dtype, transposed);
  // Chunks of neighbouring columns are apart in b.
  if (transposed && work.columns.permuted) segment.b.copied = false;
  segment.length = static_cast<int>(a.size[1]);
}

Arguments kernel_arguments(const LinearArguments& from, bool transposed) {
  const DType dtype = from.y.dtype;
  Arguments to;
  Work& work = to.work;
  work.tokens = static_cast<int>(from.y.size[0]);
  work.columns.count = static_cast<int>(from.y.size[1]);
  if (from.block) {
    work.columns.left = static_cast<int>(from.block->inner.size[1]);
    work.columns.right = static_cast<int>(from.block->up.size[0]);
  } else if (from.mix) {
    work.columns.left = static_cast<int>(from.mix->left.size[0]);
    work.columns.right = static_cast<int>(from.mix->inner.size[2]);
  }
  work.columns.permuted = from.shuffled && work.columns.left > 1 && work.columns.right > 1;

  if (from.mix) {
    to.output.pointwise = pointwise(*from.mix);
    to.output.pointwise_scale = values(from.mix->out_scale);
  }
  if (from.block && !from.mix && multiply_adds_pay(*from.block)) {
    to.output.pointwise = pointwise(*from.block);
    to.output.pointwise_scale = values(from.block->out_scale);
  } else if (from.block) {
    const View &inner = from.block->inner, &up = from.block->up;
    work.has_block = true;
    work.block_group_stride = inner.stride[1];
    work.block.a = operand(inner, 0, 2, dtype, false);
    if (inner.size[1] > 1 && !whole_chunks(inner.stride[1])) work.block.a.copied = false;
    work.block.b = operand(up, 0, 1, dtype, transposed);
    work.block.length = static_cast<int>(up.size[1]);
    to.output.block_scale = values(from.block->out_scale);
  }
  for (int i = 0; i < from.dense_count; ++i) {
    add_segment(work, from.dense[i].t, from.dense[i].up, dtype, transposed);
  }
  if (from.weight) add_segment(work, *from.x, *from.weight, dtype, transposed);
  to.output.bias = values(from.bias);
  if (from.base) to.output.base = plane(*from.base, work.columns.permuted);
  to.output.y = plane(from.y, work.columns.permuted);
  return to;
}

// The row whose tiles take the fewest rounds of the device's multiprocessors; smaller tiles read operands more often.
int chosen_config(const LinearArguments& arguments) {
  const int64_t multiprocessors = device_info().multiprocessors;
  const auto time = [&](const Configuration& config, int64_t quarters) {
    const int64_t tiles_m = (arguments.y.size[0] + config.tile_m - 1) / config.tile_m;
    const int64_t tiles_n = (arguments.y.size[1] + config.tile_n - 1) / config.tile_n;
    const int64_t rounds = (tiles_m * tiles_n + multiprocessors - 1) / multiprocessors;
    return rounds * config.tile_m * config.tile_n * quarters;
  };
  return time(linear_configurations[0], 4) <= time(linear_configurations[1], 5) ? 0 : 1;
}

void linear_plain(const LinearArguments& arguments, int config) {
  const bool transposed = transposed_operands(arguments);
  const Arguments converted = kernel_arguments(arguments, transposed);
#ifdef KRONAFUSE_ONE_INSTANCE
  KF_CHECK(arguments.y.dtype == DType::bf16, "linear: this library is built for bfloat16 alone; got ",
           arguments.y.dtype);
  launch_config<bf16>(config, transposed, converted, arguments.stream);
#else
  with_dtype(arguments.y.dtype, [&](auto element) {
    launch_config<decltype(element)>(config, transposed, converted, arguments.stream);
  });
#endif
}

}  // namespace plain

LinearForm& hopper_linear() {
  static LinearForm form = nullptr;
  return form;
}

void linear(const LinearArguments& arguments, int config) {
  check_linear(arguments);
  KF_CHECK(config >= kChoosePlain && (config < linear_configuration_count || config >= kHopperConfigs),
           "linear: config must be -1 or -2 to choose, a row of ", linear_configuration_count, " or ", kHopperConfigs,
           " plus a row of the Hopper form's; got ", config);
  if (arguments.y.empty()) return;
  const LinearForm hopper = hopper_linear();
  if (config >= kHopperConfigs) {
    KF_CHECK(hopper != nullptr, "linear: this library has no Hopper form (sm_90a was not built); got config ", config);
    KF_CHECK(hopper(arguments, config - kHopperConfigs), "linear: the Hopper form cannot serve y ", Shape{arguments.y},
             " with config ", config);
    return;
  }
  if (config == kChoose && hopper != nullptr && device_info().major == 9 && hopper(arguments, kChoose)) return;
  plain::linear_plain(arguments, config < 0 ? plain::chosen_config(arguments) : config);
}

}  // namespace kronafuse::cuda
