// out = W + s · (A ⊗ B): choice of the blocks, launch and entry.
#include "cuda/kron_merge/merge.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "cuda/kron_merge/merge.cuh"

namespace kronafuse::cuda {
namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct MergeSizes {
  int64_t n1, k1, n2, k2, rank;
};

MergeSizes check(const MergeArguments& given) {
  const std::pair<const char*, const View*> factors[] = {{"a", given.a ? &*given.a : nullptr},
                                                         {"b", &given.b},
                                                         {"b_down", given.b_down ? &*given.b_down : nullptr}};
  for (const auto& [name, factor] : factors) {
    KF_CHECK(factor == nullptr || (factor->dim == 2 && factor->size[0] > 0 && factor->size[1] > 0), "merge: ", name,
             " must be a matrix of at least 1×1; got ", Shape{*factor});
    KF_CHECK(factor == nullptr || (factor->size[0] <= kMaxIndex && factor->size[1] <= kMaxIndex), "merge: ", name,
             " must have sizes below 2^31; got ", Shape{*factor});
  }
  KF_CHECK(!given.b_down || given.b_down->size[0] == given.b.size[1], "merge: b (N2, R) and b_down (R, K2) must share R"
           "; got b ", Shape{given.b}, ", b_down ", Shape{*given.b_down});
  MergeSizes sizes{1, 1, given.b.size[0], given.b.size[1], 0};
  if (given.a) {
    sizes.n1 = given.a->size[0];
    sizes.k1 = given.a->size[1];
  }
  if (given.b_down) {
    sizes.rank = given.b.size[1];
    sizes.k2 = given.b_down->size[1];
  }
  const int64_t n = sizes.n1 * sizes.n2, k = sizes.k1 * sizes.k2;
  for (const auto& [name, matrix] : {std::pair{"weight", &given.weight}, std::pair{"out", &given.out}}) {
    KF_CHECK(matrix->dim == 2 && matrix->size[0] == n && matrix->size[1] == k, "merge: ", name,
             " must be (N, K) = (N1·N2, K1·K2) = (", n, ", ", k, "); got ", Shape{*matrix});
  }
  // A span's vectors are counted in 32 bits.
  KF_CHECK(n <= kMaxIndex && k <= kMaxIndex - 16, "merge: N and K must be below 2^31 - 16; got ", n, " and ", k);
  KF_CHECK(given.out.dtype == given.weight.dtype, "merge: out must be ", given.weight.dtype, " as weight; got ",
           given.out.dtype);
  KF_CHECK(distinct_elements(given.out), "merge: out must not name an element twice; got strides ",
           Strides{given.out});
  KF_CHECK(!ranges_meet(given.out, given.weight), "merge: out must not share memory with weight");
  KF_CHECK(!given.scale_tensor || given.scale_tensor->elements() == 1,
           "merge: scale_tensor must have one element; got ", Shape{*given.scale_tensor});
  return sizes;
}

MergeParameters parameters_of(const MergeArguments& given, const MergeSizes& sizes) {
  MergeParameters p{};
  p.left_out = static_cast<int>(sizes.n1);
  p.left_in = static_cast<int>(sizes.k1);
  p.right_out = static_cast<int>(sizes.n2);
  p.right_in = static_cast<int>(sizes.k2);
  p.rank = static_cast<int>(sizes.rank);
  p.shuffled = given.shuffled;
  p.weight = given.weight.data;
  p.w_n = given.weight.stride[0];
  p.w_k = given.weight.stride[1];
  p.out = given.out.data;
  p.out_n = given.out.stride[0];
  p.out_k = given.out.stride[1];
  if (given.a) {
    p.a = given.a->data;
    p.a_dtype = given.a->dtype;
    p.a_n = given.a->stride[0];
    p.a_k = given.a->stride[1];
  }
  p.b = given.b.data;
  p.b_dtype = given.b.dtype;
  p.b_n = given.b.stride[0];
  p.b_k = given.b.stride[1];
  if (given.b_down) {
    p.b_down = given.b_down->data;
    p.down_dtype = given.b_down->dtype;
    p.down_r = given.b_down->stride[0];
    p.down_k = given.b_down->stride[1];
  }
  p.scale = given.scale;
  if (given.scale_tensor) {
    p.scale_tensor = given.scale_tensor->data;
    p.scale_dtype = given.scale_tensor->dtype;
  }
  return p;
}

// As many rows of A to a block as leave every multiprocessor several blocks.
void set_blocks(MergeParameters& p, int vector, int multiprocessors) {
  constexpr int64_t kBlocksEach = 8;
  p.chunk = std::min(p.right_in, kMergeChunk);
  p.chunks = static_cast<int>(blocks(p.right_in, p.chunk));
  p.spans = p.chunks == 1 ? 1 : p.left_in;
  const int64_t length = p.chunks == 1 ? static_cast<int64_t>(p.left_in) * p.right_in : p.chunk;
  p.cells = static_cast<int>((length + 2 * vector - 2) / vector);
  const int64_t single = static_cast<int64_t>(p.right_out) * p.chunks * p.left_out;
  const int64_t most = std::max<int64_t>(1, (kMaxIndex / 2) / (static_cast<int64_t>(p.spans) * p.cells));
  const int64_t rows = std::clamp<int64_t>(single / (kBlocksEach * multiprocessors), 1, p.left_out);
  p.rows = static_cast<int>(std::min(rows, most));
  p.row_blocks = static_cast<int>(blocks(p.left_out, p.rows));
}

template <class T>
void launch_merge(MergeParameters p, Stream stream) {
  using Traits = MergeTraits<T>;
  set_blocks(p, Traits::kVector, device_info().multiprocessors);
  const int64_t grid = static_cast<int64_t>(p.right_out) * p.chunks * p.row_blocks;
  KF_CHECK(grid <= kMaxIndex, "merge: N1·N2 rows must make fewer than 2^31 blocks; got ", grid);
  Launch launch_of_all;
  launch_of_all.grid.x = static_cast<unsigned>(grid);
  launch_of_all.threads = kMergeThreads;
  launch_of_all.shared_bytes = merge_shared_bytes(p.chunk, Traits::kVector, sizeof(typename Traits::Wide));
  launch_of_all.stream = stream;
  launch<merge_kernel<T>>(launch_of_all, p);
}

}  // namespace

void merge(const MergeArguments& given) {
  const MergeSizes sizes = check(given);
  const MergeParameters p = parameters_of(given, sizes);
  switch (given.weight.dtype) {
    case DType::bf16:
      return launch_merge<bf16>(p, given.stream);
#ifndef KRONAFUSE_ONE_INSTANCE
    case DType::f16:
      return launch_merge<f16>(p, given.stream);
    case DType::f32:
      return launch_merge<float>(p, given.stream);
    case DType::f64:
      return launch_merge<double>(p, given.stream);
#endif
    default:
      KF_CHECK(false, "merge: this library has one instance, bfloat16; got ", given.weight.dtype);
  }
}

}  // namespace kronafuse::cuda
