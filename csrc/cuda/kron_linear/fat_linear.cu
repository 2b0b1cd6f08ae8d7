// y = x Wᵀ + bias + base + s · out_scale ⊙ (A ⊗ B)(in_scale ⊙ x): choice of the tile, launch and entry.
#include "cuda/kron_linear/fat_linear.h"

#include <limits>

#include "cuda/kron_linear/fat_linear.cuh"
#include "cuda/kron_linear/fat_linear_sm90a.h"

namespace kronafuse::cuda {
namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Strides of the left and the right index of a dimension of features.
struct Split {
  int64_t first, second;
};

Split split(int64_t stride, int64_t left, int64_t right, bool shuffled) {
  return shuffled ? Split{stride, stride * left} : Split{stride * right, stride};
}

bool multiples_of_8(std::initializer_list<int64_t> strides) {
  for (const int64_t stride : strides) {
    if (stride % 8 != 0) return false;
  }
  return true;
}

bool aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; }

void check_features(const char* name, const std::optional<View>& view, int64_t count) {
  if (!view) return;
  KF_CHECK(view->dim == 1 && view->size[0] == count, "fat_linear: ", name, " must be (", count, ",); got ",
           Shape{*view});
}

void check_matrix(const char* name, const View& view, int64_t rows, int64_t columns, DType dtype) {
  KF_CHECK(view.dim == 2 && view.size[0] == rows && view.size[1] == columns, "fat_linear: ", name, " must be (", rows,
           ", ", columns, "); got ", Shape{view});
  KF_CHECK(view.dtype == dtype, "fat_linear: ", name, " must be ", dtype, " as y; got ", view.dtype);
}

void check(const FatArguments& given) {
  const DType dtype = given.y.dtype;
  KF_CHECK(dtype == DType::bf16 || dtype == DType::f16, "fat_linear: y must be float16 or bfloat16; got ", dtype);
  for (const auto& [name, factor] : {std::pair{"a", &given.a}, std::pair{"b", &given.b}}) {
    KF_CHECK(factor->dim == 2 && factor->size[0] > 0 && factor->size[1] > 0, "fat_linear: ", name,
             " must be a matrix of at least 1×1; got ", Shape{*factor});
    KF_CHECK(factor->dtype == dtype || factor->dtype == DType::f32, "fat_linear: ", name, " must be ", dtype,
             " or float32; got ", factor->dtype);
    KF_CHECK(factor->size[0] <= kMaxIndex && factor->size[1] <= kMaxIndex, "fat_linear: ", name,
             " must have sizes below 2^31; got ", Shape{*factor});
  }
  const int64_t in = given.a.size[1] * given.b.size[1], out = given.a.size[0] * given.b.size[0];
  // Indices run to the end of the last tile.
  KF_CHECK(in <= kMaxIndex - 256 && out <= kMaxIndex - 256,
           "fat_linear: K = I1·I2 and N = O1·O2 must be below 2^31 - 256; got ", in, " and ", out);
  const int64_t tokens = given.y.size[0];
  check_matrix("y", given.y, tokens, out, dtype);
  KF_CHECK(distinct_elements(given.y), "fat_linear: y must not name an element twice; got strides ",
           Strides{given.y});
  check_matrix("x", given.x, tokens, in, dtype);
  if (given.weight) check_matrix("weight", *given.weight, out, in, dtype);
  if (given.base) check_matrix("base", *given.base, tokens, out, dtype);
  check_features("bias", given.bias, out);
  check_features("in_scale", given.in_scale, in);
  check_features("out_scale", given.out_scale, out);
  KF_CHECK(!given.scale_tensor || given.scale_tensor->elements() == 1,
           "fat_linear: scale_tensor must have one element; got ", Shape{*given.scale_tensor});
}

FatParameters parameters_of(const FatArguments& given) {
  FatParameters p{};
  p.tokens = given.y.size[0];
  p.left_out = static_cast<int>(given.a.size[0]);
  p.left_in = static_cast<int>(given.a.size[1]);
  p.right_out = static_cast<int>(given.b.size[0]);
  p.right_in = static_cast<int>(given.b.size[1]);
  const auto in = [&](int64_t stride) { return split(stride, p.left_in, p.right_in, given.in_shuffled); };
  const auto out = [&](int64_t stride) { return split(stride, p.left_out, p.right_out, given.out_shuffled); };
  const bool in_dense = p.right_in % 8 == 0, out_dense = p.right_out % 8 == 0;

  p.x = given.x.data;
  p.x_m = given.x.stride[0];
  p.x_1 = in(given.x.stride[1]).first;
  p.x_2 = in(given.x.stride[1]).second;
  p.x_vectors = in_dense && p.x_2 == 1 && multiples_of_8({p.x_m, p.x_1}) && aligned(given.x);
  if (given.weight) {
    const View& weight = *given.weight;
    p.weight = weight.data;
    p.w_1 = out(weight.stride[0]).first;
    p.w_2 = out(weight.stride[0]).second;
    p.w_k1 = in(weight.stride[1]).first;
    p.w_k2 = in(weight.stride[1]).second;
    const bool along_k = in_dense && p.w_k2 == 1 && multiples_of_8({p.w_1, p.w_2, p.w_k1});
    const bool along_n = out_dense && p.w_2 == 1 && multiples_of_8({p.w_1, p.w_k1, p.w_k2});
    p.w_vectors = (along_k || along_n) && aligned(weight);
  }
  if (given.bias) {
    p.bias = given.bias->data;
    p.bias_dtype = given.bias->dtype;
    p.bias_1 = out(given.bias->stride[0]).first;
    p.bias_2 = out(given.bias->stride[0]).second;
  }
  if (given.base) {
    p.base = given.base->data;
    p.base_m = given.base->stride[0];
    p.base_1 = out(given.base->stride[1]).first;
    p.base_2 = out(given.base->stride[1]).second;
    p.base_vectors = out_dense && p.base_2 == 1 && multiples_of_8({p.base_m, p.base_1}) && aligned(*given.base);
  }
  p.a = given.a.data;
  p.a_float32 = given.a.dtype == DType::f32;
  p.a_o = given.a.stride[0];
  p.a_i = given.a.stride[1];
  p.b = given.b.data;
  p.b_float32 = given.b.dtype == DType::f32;
  p.b_o = given.b.stride[0];
  p.b_i = given.b.stride[1];
  p.b_transposed = p.b_i != 1 && p.b_o == 1;
  const int64_t b_vector = p.b_float32 ? 4 : 8, b_gap = p.b_transposed ? p.b_i : p.b_o;
  p.b_vectors = (p.b_transposed || p.b_i == 1) && (p.b_transposed ? p.right_out : p.right_in) % b_vector == 0 &&
                b_gap % b_vector == 0 && aligned(given.b);
  if (given.in_scale) {
    p.in_scale = given.in_scale->data;
    p.in_scale_dtype = given.in_scale->dtype;
    p.in_1 = in(given.in_scale->stride[0]).first;
    p.in_2 = in(given.in_scale->stride[0]).second;
  }
  if (given.out_scale) {
    p.out_scale = given.out_scale->data;
    p.out_scale_dtype = given.out_scale->dtype;
    p.out_1 = out(given.out_scale->stride[0]).first;
    p.out_2 = out(given.out_scale->stride[0]).second;
  }
  p.scale = given.scale;
  if (given.scale_tensor) {
    p.scale_tensor = given.scale_tensor->data;
    p.scale_dtype = given.scale_tensor->dtype;
  }
  p.y = given.y.data;
  p.y_m = given.y.stride[0];
  p.y_1 = out(given.y.stride[1]).first;
  p.y_2 = out(given.y.stride[1]).second;
  p.y_vectors = out_dense && p.y_2 == 1 && multiples_of_8({p.y_m, p.y_1}) && aligned(given.y);
  return p;
}

// W by 16 bytes along its output features: another layout in shared memory, and another instance of the kernel.
bool transposed(const FatParameters& p) { return p.w_vectors && p.w_k2 != 1; }

template <class Tile>
void set_grid(FatParameters& p) {
  p.units_per_group = blocks(p.right_out, Tile::kWarpN);
  p.units = p.units_per_group * p.left_out;
  p.n_blocks = blocks(p.units, kFatWarpsN);
  p.m_blocks = blocks(p.tokens, Tile::kBlockM);
}

template <class Tile>
int shared_bytes(const FatParameters& p) {
  return Tile::shared_bytes(transposed(p), p.left_in, p.b_float32 ? 4 : 2);
}

template <class Tile>
double predicted(FatParameters p, const DeviceInfo& device) {
  if (shared_bytes<Tile>(p) > device.shared_per_block) return std::numeric_limits<double>::infinity();
  set_grid<Tile>(p);
  // Two small blocks take turns on a multiprocessor's tensor cores, and each keeps them fed while the other waits.
  const int64_t together = Tile::kThreads <= 128 ? 2 : 1;
  const double time = fat_predicted_time(p.m_blocks * p.n_blocks, together * device.multiprocessors, Tile::kBlockM,
                                         together * Tile::kBlockN);
  // A warp's products read kFatWarpM + kWarpN rows of shared memory for kFatWarpM · kWarpN results.
  return time * (1.0 + static_cast<double>(kFatWarpM) / Tile::kWarpN);
}

struct Choice {
  int config;
  double time;
};

Choice choose(const FatParameters& p, const DeviceInfo& device) {
  Choice best{2, predicted<FatSmall>(p, device)};
  for (const Choice other : {Choice{1, predicted<FatSquare>(p, device)}, Choice{0, predicted<FatWide>(p, device)}}) {
    if (other.time < best.time) best = other;
  }
  return best;
}

template <class T, class Tile, bool TRANSPOSED>
void launch_tile(FatParameters p, Stream stream) {
  set_grid<Tile>(p);
  KF_CHECK(p.m_blocks <= kMaxIndex / p.n_blocks, "fat_linear: y must have fewer than 2^31 tiles; got ", p.m_blocks,
           " x ", p.n_blocks);
  Launch launch_of_all;
  launch_of_all.grid.x = static_cast<unsigned>(p.m_blocks * p.n_blocks);
  launch_of_all.threads = Tile::kThreads;
  launch_of_all.shared_bytes = shared_bytes<Tile>(p);
  launch_of_all.stream = stream;
  launch<fat_linear_kernel<T, Tile, TRANSPOSED>>(launch_of_all, p);
}

template <class T, class Tile>
void launch_with(const FatParameters& p, Stream stream) {
  if (transposed(p)) {
    launch_tile<T, Tile, true>(p, stream);
  } else {
    launch_tile<T, Tile, false>(p, stream);
  }
}

template <class T>
void launch_config(const FatParameters& p, int config, Stream stream) {
  if (config == 0) {
    launch_with<T, FatWide>(p, stream);
  } else if (config == 1) {
    launch_with<T, FatSquare>(p, stream);
  } else {
    launch_with<T, FatSmall>(p, stream);
  }
}

}  // namespace

FatHopperForm& fat_hopper_form() {
  static FatHopperForm form = nullptr;
  return form;
}

double fat_predicted_time(int64_t tiles, int64_t at_a_time, int64_t tile_m, int64_t tile_n) {
  return static_cast<double>(blocks(tiles, at_a_time)) * static_cast<double>(tile_m * tile_n);
}

void fat_linear(const FatArguments& given, int config) {
  check(given);
  constexpr int kConfigs = static_cast<int>(std::size(fat_linear_configurations));
  const bool names_hopper = config >= kFatHopperConfigs && config < kFatHopperConfigs + kFatHopperRows;
  KF_CHECK((config >= -1 && config < kConfigs) || names_hopper, "fat_linear: config must be -1 .. ", kConfigs - 1,
           " or ", kFatHopperConfigs, " .. ", kFatHopperConfigs + kFatHopperRows - 1, "; got ", config);
  const FatParameters p = parameters_of(given);
  if (p.tokens == 0) return;
  const DType dtype = given.y.dtype;
  if (config == -1 || names_hopper) {
    const DeviceInfo device = device_info();
    const Choice plain = choose(p, device);
    const FatHopperForm hopper = device.major == 9 ? fat_hopper_form() : nullptr;
    const int row = names_hopper ? config - kFatHopperConfigs : -1;
    if (hopper != nullptr && hopper(p, dtype, row, plain.time, given.stream)) return;
    KF_CHECK(!names_hopper, "fat_linear: config ", config, ", the Hopper form, cannot serve this call",
             hopper == nullptr ? ": it needs sm_90 and a library built for sm_90a" : "");
    config = plain.config;
  }
#ifdef KRONAFUSE_ONE_INSTANCE
  KF_CHECK(dtype == DType::bf16 && !transposed(p),
           "fat_linear: this library has one instance of each tile, bfloat16 with W in rows");
  launch_tile<bf16, FatWide, false>(p, given.stream);
#else
  if (dtype == DType::bf16) {
    launch_config<bf16>(p, config, given.stream);
  } else {
    launch_config<f16>(p, config, given.stream);
  }
#endif
}

}  // namespace kronafuse::cuda
