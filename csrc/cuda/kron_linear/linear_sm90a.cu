// The Hopper form's entry: takes the operand pairs that TMA can read, chooses a tile for them, and launches.
#include "cuda/kron_linear/linear_sm90a.h"

#include <limits>
#include <utility>

#include "cuda/common/types.cuh"
#include "cuda/kron_linear/sm90a/launch.h"
#include "cuda/kron_linear/sm90a/operands.h"
#include "cuda/kron_linear/sm90a/planning.h"

namespace kronafuse::cuda {
namespace {

using namespace hopper;

using Launcher = void (*)(const HopperProblem&, Stream);

// Null for what this build leaves out.
template <int Form>
Launcher launcher_of(DType dtype, bool transposed) {
#ifdef KRONAFUSE_ONE_INSTANCE
  if constexpr (Form == 0) {
    if (dtype == DType::bf16 && !transposed) return launch_linear_sm90a<bf16, Form, false>;
  }
  return nullptr;
#else
  if (dtype == DType::bf16) {
    return transposed ? launch_linear_sm90a<bf16, Form, true> : launch_linear_sm90a<bf16, Form, false>;
  }
  return transposed ? launch_linear_sm90a<f16, Form, true> : launch_linear_sm90a<f16, Form, false>;
#endif
}

template <int... Forms>
Launcher launcher_of(int form, DType dtype, bool transposed, std::integer_sequence<int, Forms...>) {
  Launcher found = nullptr;
  ((form == Forms ? void(found = launcher_of<Forms>(dtype, transposed)) : void()), ...);
  return found;
}

Launcher launcher_of(int form, DType dtype, bool transposed) {
  return launcher_of(form, dtype, transposed, std::make_integer_sequence<int, kHopperFormCount>());
}

bool can_run(int row, const Operands& operands, DType dtype) {
  const int form = row / kHopperClusters;
  return launcher_of(form, dtype, operands.transposed) != nullptr &&
         operands.pieces(kHopperBlockK, kHopperForms[form].tile_n) <= kMaximumSize;
}

// The row that the cost model likes best among those that can run, or -1.
int choose(const Operands& operands, const View& y, int multiprocessors) {
  int best = -1;
  double best_cost = std::numeric_limits<double>::infinity();
  for (int row = 0; row < kHopperRows; ++row) {
    if (!can_run(row, operands, y.dtype)) continue;
    const HopperForm form = kHopperForms[row / kHopperClusters];
    const double cost = hopper_cost(form, row % kHopperClusters + 1, y.size[0], y.size[1],
                                    operands.pieces(16, form.tile_n), multiprocessors);
    if (cost < best_cost) {
      best = row;
      best_cost = cost;
    }
  }
  return best;
}

Segment segment_of(const Pair& pair, HopperForm form, int cluster, const Operands& operands) {
  const bool transposed = operands.transposed;
  const TensorExtent a[3] = {{pair.width, 2, kHopperBlockK},
                             {pair.a_blocks, pair.a_block_pitch * 2, 1},
                             {pair.a.outer, pair.a.pitch * 2, form.tile_m}};
  return {make_tensor_map(pair.a.data, pair.a.dtype, 3, a, Swizzle::b128),
          make_tensor_map(pair.b.data, pair.b.dtype, pair.b.inner, pair.b.outer, pair.b.pitch * 2,
                          hopper_b_box_inner(form, transposed), hopper_b_box_outer(form, transposed, cluster),
                          hopper_b_swizzle(form, transposed)),
          static_cast<int>(pair.width), static_cast<int>(passes_of(pair, form.tile_n)),
          static_cast<int>(pair.period)};
}

TensorMap chunk_map(const Rows& rows, int columns) {
  return make_tensor_map(rows.data, rows.dtype, rows.inner, rows.outer, rows.pitch * 2, columns, 64,
                         columns == kHopperChunkN ? Swizzle::b128 : Swizzle::b64);
}

// Rows of clusters whose tiles are taken together: about 2048 rows of x.
int group_of(HopperForm form, int cluster) { return std::max(1, 2048 / (form.tile_m * cluster)); }

TileSchedule schedule_of(HopperForm form, int cluster, const View& y, int multiprocessors) {
  const auto tiles_along = [](int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); };
  TileSchedule schedule;
  schedule.tile_m = form.tile_m;
  schedule.tile_n = form.tile_n;
  schedule.cluster = cluster;
  schedule.m_clusters = tiles_along(y.size[0], form.tile_m * cluster);
  schedule.n_tiles = tiles_along(y.size[1], form.tile_n);
  schedule.group = group_of(form, cluster);
  const int64_t count = int64_t{schedule.m_clusters} * schedule.n_tiles;
  KF_CHECK(count <= kMaximumSize && int64_t{schedule.group} * schedule.n_tiles <= kMaximumSize,
           "linear: y must have at most 2^30 tiles; got ", count, " of ", form.tile_m, "x", form.tile_n);
  schedule.clusters = static_cast<int>(std::min<int64_t>(count, std::max(multiprocessors / cluster, 1)));
  return schedule;
}

}  // namespace

bool linear_sm90a(const LinearArguments& arguments, int config) {
  KF_CHECK(config >= -1 && config < kHopperRows, "linear: config of the Hopper form must be -1 .. ", kHopperRows - 1,
           "; got ", config);
  const View& y = arguments.y;
  const DeviceInfo device = device_info();
  if (device.major != 9 || y.empty() || arguments.mix || (arguments.shuffled && arguments.block)) return false;
  const std::optional<Rows> y_rows = rows_of(y, 1);
  const std::optional<Rows> base_rows = arguments.base ? rows_of(*arguments.base, 1) : std::nullopt;
  if (!y_rows || (arguments.base && !base_rows)) return false;
  if (arguments.bias && arguments.bias->dtype != y.dtype && arguments.bias->dtype != DType::f32) return false;
  std::optional<Operands> operands = operands_of(arguments, false);
  if (!operands) operands = operands_of(arguments, true);
  if (!operands) return false;
  const int row = config >= 0 ? config : choose(*operands, y, device.multiprocessors);
  if (row < 0 || !can_run(row, *operands, y.dtype)) return false;

  const HopperForm form = kHopperForms[row / kHopperClusters];
  const int cluster = row % kHopperClusters + 1;
  HopperProblem problem{};
  for (int i = 0; i < operands->count; ++i) {
    problem.segments[i] = segment_of(operands->pairs[i], form, cluster, *operands);
  }
  problem.segment_count = operands->count;
  problem.k_blocks = static_cast<int>(operands->pieces(kHopperBlockK, form.tile_n));
  problem.schedule = schedule_of(form, cluster, y, device.multiprocessors);
  problem.n = static_cast<int>(y.size[1]);
  problem.y = chunk_map(*y_rows, kHopperChunkN);
  if (form.tile_n % kHopperChunkN) problem.y_narrow = chunk_map(*y_rows, form.tile_n % kHopperChunkN);
  if (base_rows) {
    problem.has_base = true;
    problem.base = chunk_map(*base_rows, kHopperChunkN);
    if (form.tile_n % kHopperChunkN) problem.base_narrow = chunk_map(*base_rows, form.tile_n % kHopperChunkN);
  }
  if (arguments.bias) {
    problem.bias = arguments.bias->data;
    problem.bias_stride = arguments.bias->stride[0];
    problem.bias_is_float = arguments.bias->dtype == DType::f32;
  }
  launcher_of(row / kHopperClusters, y.dtype, operands->transposed)(problem, arguments.stream);
  return true;
}

namespace {

const bool registered = (hopper_linear() = linear_sm90a, true);

}  // namespace
}  // namespace kronafuse::cuda
