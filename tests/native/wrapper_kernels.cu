// Small kernels that use each wrapper of csrc/cuda/common once, behind C functions: test_emulation.py compiles this
// file for the host, and for the GPU where there is one.
#include <string>

#include "cuda/common/async.cuh"
#include "cuda/common/barrier.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/common/types.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/common/wgmma.cuh"

namespace kronafuse::cuda {
namespace {

// d (16, 8) = a (16, 16) · b, with b given as (8, 16), or as (16, 8) and read transposed.
template <class T>
__global__ void warp_product(const T* a, const T* b, float* d, bool transposed) {
  T* a_shared = reinterpret_cast<T*>(dynamic_shared());
  T* b_shared = a_shared + 256;
  for (int i = lane(); i < 256; i += 32) a_shared[i] = a[i];
  for (int i = lane(); i < 128; i += 32) b_shared[i] = b[i];
  sync_warp();
  uint32_t a_fragment[4], b_fragment[2];
  ldmatrix_x4(a_fragment, a_shared + lane() % 16 * 16 + lane() / 16 * 8);
  const int row = lane() % 16;
  if (transposed) {
    ldmatrix_x2_trans(b_fragment, b_shared + row * 8);
  } else {
    ldmatrix_x2(b_fragment, b_shared + row % 8 * 16 + row / 8 * 8);
  }
  float sums[4] = {};
  mma_m16n8k16<T>(sums, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) d[(lane() / 4 + 8 * (i / 2)) * 8 + lane() % 4 * 2 + i % 2] = sums[i];
}

// d (64, N) = a (64, k) · bᵀ, b (N, k) or, transposed, (k, N); k a multiple of 64. TMA in, wgmma in blocks of 64.
template <class T, int N, bool TransB, bool ARegisters>
__global__ void __launch_bounds__(128, 1)
    group_product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* d, int k) {
  constexpr Swizzle b_swizzle = TransB && N % 64 != 0 ? Swizzle::b64 : Swizzle::b128;
  constexpr int b_box = span_of(b_swizzle) / 2;
  unsigned char* a_shared = dynamic_shared();
  unsigned char* b_shared = a_shared + 64 * 128;
  uint64_t* barrier = reinterpret_cast<uint64_t*>(b_shared + N * 128);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  float acc[N / 2];
  for (int block = 0; block < k / 64; ++block) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, (64 + N) * 128);
      tma_load(a_shared, a_map, 64 * block, 0, barrier);
      if (TransB) {
        for (int n = 0; n < N; n += b_box) tma_load(b_shared + n * 128, b_map, n, 64 * block, barrier);
      } else {
        tma_load(b_shared, b_map, 64 * block, 0, barrier);
      }
    }
    mbarrier_wait(barrier, block & 1);
    const uint64_t a_tile = wgmma_descriptor_k_major(a_shared);
    const uint64_t b_tile =
        TransB ? wgmma_descriptor_mn_major(b_shared, 64, b_swizzle) : wgmma_descriptor_k_major(b_shared);
    uint32_t fragments[4][4];
    for (int i = 0; i < 4; ++i) {
      // The swizzled place of row and chunk, as ldmatrix needs it to give A's layout in registers.
      const int row = warp_index() * 16 + lane() % 16;
      const uint32_t offset = static_cast<uint32_t>(row * 128 + 32 * i + lane() / 16 * 16);
      ldmatrix_x4(fragments[i], a_shared + swizzled(offset, Swizzle::b128));
    }
    wgmma_fence_operands(acc);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint64_t b_part = wgmma_advance(b_tile, TransB ? 16 * span_of(b_swizzle) * i : 32 * i);
      if constexpr (ARegisters) {
        wgmma_m64k16<N, T, TransB>(acc, fragments[i], b_part, block + i > 0);
      } else {
        wgmma_m64k16<N, T, TransB>(acc, wgmma_advance(a_tile, 32 * i), b_part, block + i > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_fence_operands(acc);
    __syncthreads();
  }
  for (int i = 0; i < N / 2; ++i) {
    const int row = warp_index() * 16 + lane() / 4 + 8 * (i >> 1 & 1);
    d[row * N + 8 * (i / 4) + lane() % 4 * 2 + (i & 1)] = acc[i];
  }
}

// y = x (rows, columns) by boxes of 32 rows: a producer warp fills stages, each of a pair of blocks loading one half
// for both; two consumer warps give them back and store through another buffer. Odd sizes are cut at the edge.
template <class T>
__global__ void __launch_bounds__(96, 1)
    cluster_copy(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map, int tiles) {
  constexpr int stages = 2, box = 64 * 32 * 2, half = box / 2;
  unsigned char* ring = dynamic_shared();
  unsigned char* staging = ring + stages * box;
  uint64_t* full = reinterpret_cast<uint64_t*>(staging + box);
  uint64_t* empty = full + stages;
  const uint32_t rank = cluster_rank(), blocks = cluster_size();
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, 2 * blocks);
    }
    fence_mbarrier_init();
  }
  cluster_sync();
  if (warp_index() == 2) {
    if (elect_one()) {
      for (int tile = 0; tile < tiles; ++tile) {
        const int s = tile % stages, parity = tile / stages & 1;
        mbarrier_wait(empty + s, parity ^ 1);
        mbarrier_arrive_expect(full + s, box);
        if (blocks == 2) {
          tma_load_multicast(ring + s * box + rank * half, x_map, 0, 32 * tile + 16 * rank, full + s, 3);
        } else {
          tma_load(ring + s * box, x_map, 0, 32 * tile, full + s);
          tma_load(ring + s * box + half, x_map, 0, 32 * tile + 16, full + s);
        }
      }
    }
  } else {
    for (int tile = 0; tile < tiles; ++tile) {
      const int s = tile % stages, parity = tile / stages & 1;
      mbarrier_wait(full + s, parity);
      // Each block of the pair writes every other tile.
      const bool mine = tile % blocks == rank;
      if (mine) {
        if (threadIdx.x == 0) tma_store_wait_read<0>();
        named_barrier(1, 64);
        for (int i = threadIdx.x; i < box / 16; i += 64) {
          store_16(staging + 16 * i, load_16<T>(ring + s * box + 16 * i));
        }
        fence_async_shared();
        named_barrier(1, 64);
        if (threadIdx.x == 0) {
          tma_store(y_map, staging, 0, 32 * tile);
          tma_store(y_map, staging + half, 0, 32 * tile + 16);
          tma_store_commit();
        }
      }
      sync_warp();
      if (lane() == 0) {
        for (uint32_t block = 0; block < blocks; ++block) {
          if (block == rank) {
            mbarrier_arrive(empty + s);
          } else {
            mbarrier_arrive_cluster(empty + s, block);
          }
        }
      }
    }
    if (threadIdx.x == 0) tma_store_wait<0>();
  }
  cluster_sync();
}

// sums (256) of the rows of x (256, columns): every thread copies pieces of its neighbours' rows, three stages deep.
template <class T>
__global__ void staged_sums(const T* x, float* sums, int columns, bool forget_wait) {
  constexpr int stages = 3;
  unsigned char* ring = dynamic_shared();
  const int row = static_cast<int>(threadIdx.x), neighbour = row ^ 1, chunks = columns / 8;
  const auto fetch = [&](int chunk) {
    const bool valid = chunk < chunks;
    const T* source = valid ? x + neighbour * columns + chunk * 8 : nullptr;
    cp_async_16(ring + (chunk % stages * 256 + neighbour) * 16, source, valid);
    cp_async_commit();
  };
  fetch(0);
  fetch(1);
  float sum = 0.0f;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (!forget_wait) cp_async_wait<1>();
    __syncthreads();
    const Vec16<T> piece = load_16<T>(ring + (chunk % stages * 256 + row) * 16);
    for (int i = 0; i < 8; ++i) sum += to_float(piece[i]);
    fetch(chunk + 2);
  }
  cp_async_wait<0>();
  sums[row] = sum;
}

// total[w] = the sum over warp w of values; first[w] = the value of lane 7.
__global__ void warp_exchange(const float* values, float* total, float* first) {
  const float value = values[threadIdx.x];
  const float sum = warp_sum(value);
  const float seventh = shfl(value, 7);
  if (elect_one()) {
    total[warp_index()] = sum;
    first[warp_index()] = seventh;
  }
}

template <class T>
__global__ void round_trip(const float* values, T* rounded, float* widened, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  rounded[i] = from_float<T>(values[i]);
  const Float2 pair = unpack2<T>(pack2<T>(values[i], -values[i]));
  widened[i] = pair.x == -pair.y ? to_float(rounded[i]) : 1e30f;
}

#ifdef KRONAFUSE_EMULATED

__global__ void wait_for_nobody() {
  uint64_t* barrier = reinterpret_cast<uint64_t*>(dynamic_shared());
  if (threadIdx.x == 0) mbarrier_init(barrier, 2);
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_arrive(barrier);
  if (warp_index() == 0) mbarrier_wait(barrier, 0);
  if (warp_index() == 1) named_barrier(3, 64);
}

__global__ void parted_lanes() {
  if (lane() < 16) {
    sync_warp();
  } else {
    elect_one();
  }
}

__global__ void beyond_shared(int bytes) { dynamic_shared()[bytes] = 1; }

__global__ void unwaited_store(const __grid_constant__ TensorMap map) {
  fence_async_shared();
  if (threadIdx.x == 0) tma_store(map, dynamic_shared(), 0, 0);
}

__global__ void unfenced_store(const __grid_constant__ TensorMap map) {
  if (threadIdx.x != 0) return;
  tma_store(map, dynamic_shared(), 0, 0);
  tma_store_commit();
  tma_store_wait<0>();
}

#endif

template <class Body>
const char* guarded(Body&& body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <int N, bool TransB>
void group_product_of(const void* a, const void* b, float* d, int k, DType dtype, bool a_registers) {
  constexpr Swizzle b_swizzle = TransB && N % 64 != 0 ? Swizzle::b64 : Swizzle::b128;
  const TensorMap a_map = make_tensor_map(a, dtype, k, 64, 2 * k, 64, 64, Swizzle::b128);
  const TensorMap b_map = TransB ? make_tensor_map(b, dtype, N, k, 2 * N, span_of(b_swizzle) / 2, 64, b_swizzle)
                                 : make_tensor_map(b, dtype, k, N, 2 * k, 64, N, Swizzle::b128);
  const Launch shape{{1}, 128, (64 + N) * 128 + 64};
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (a_registers) {
      launch<group_product<T, N, TransB, true>>(shape, a_map, b_map, d, k);
    } else {
      launch<group_product<T, N, TransB, false>>(shape, a_map, b_map, d, k);
    }
  });
}

}  // namespace
}  // namespace kronafuse::cuda

using namespace kronafuse;
using namespace kronafuse::cuda;

#define KF_EXPORT extern "C" __attribute__((visibility("default"))) const char*

KF_EXPORT run_warp_product(const void* a, const void* b, float* d, int transposed, int dtype) {
  return guarded([&] {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
      using T = decltype(tag);
      launch<warp_product<T>>(Launch{{1}, 32, 1024}, static_cast<const T*>(a), static_cast<const T*>(b), d,
                              transposed != 0);
    });
  });
}

KF_EXPORT run_group_product(const void* a, const void* b, float* d, int n, int k, int transposed, int a_registers,
                            int dtype) {
  return guarded([&] {
    const auto run = [&](auto size) {
      constexpr int N = decltype(size)::value;
      if (n != N) return;
      if (transposed) {
        group_product_of<N, true>(a, b, d, k, static_cast<DType>(dtype), a_registers != 0);
      } else {
        group_product_of<N, false>(a, b, d, k, static_cast<DType>(dtype), a_registers != 0);
      }
    };
    run(std::integral_constant<int, 64>{});
    run(std::integral_constant<int, 96>{});
    run(std::integral_constant<int, 128>{});
    run(std::integral_constant<int, 160>{});
    run(std::integral_constant<int, 192>{});
    run(std::integral_constant<int, 256>{});
  });
}

KF_EXPORT run_cluster_copy(const void* x, void* y, int rows, int columns, int row_bytes, int cluster, int dtype) {
  return guarded([&] {
    const auto type = static_cast<DType>(dtype);
    const TensorMap x_map = make_tensor_map(x, type, columns, rows, row_bytes, 64, 16, Swizzle::b128);
    const TensorMap y_map = make_tensor_map(y, type, columns, rows, row_bytes, 64, 16, Swizzle::b128);
    const Launch shape{{static_cast<unsigned>(cluster)}, 96, 3 * 4096 + 64, nullptr, cluster};
    with_dtype(type, [&](auto tag) { launch<cluster_copy<decltype(tag)>>(shape, x_map, y_map, (rows + 31) / 32); });
  });
}

KF_EXPORT run_staged_sums(const void* x, float* sums, int columns, int forget_wait, int dtype) {
  return guarded([&] {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
      using T = decltype(tag);
      launch<staged_sums<T>>(Launch{{1}, 256, 3 * 256 * 16}, static_cast<const T*>(x), sums, columns, forget_wait != 0);
    });
  });
}

KF_EXPORT run_warp_exchange(const float* values, float* total, float* first, int warps) {
  return guarded([&] { launch<warp_exchange>(Launch{{1}, 32 * warps}, values, total, first); });
}

KF_EXPORT run_round_trip(const float* values, void* rounded, float* widened, int64_t count, int dtype) {
  return guarded([&] {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
      using T = decltype(tag);
      const Launch shape{{static_cast<unsigned>((count + 255) / 256)}, 256};
      launch<round_trip<T>>(shape, values, static_cast<T*>(rounded), widened, count);
    });
  });
}

KF_EXPORT run_refused_launch() {
  return guarded([&] { launch<warp_exchange>(Launch{{1}, 2048}, nullptr, nullptr, nullptr); });
}

#ifdef KRONAFUSE_EMULATED

KF_EXPORT run_wait_for_nobody() {
  return guarded([&] { launch<wait_for_nobody>(Launch{{1}, 96, 64}); });
}

KF_EXPORT run_parted_lanes() {
  return guarded([&] { launch<parted_lanes>(Launch{{1}, 32}); });
}

KF_EXPORT run_beyond_shared() {
  return guarded([&] { launch<beyond_shared>(Launch{{1}, 32, 64}, 64); });
}

KF_EXPORT run_unwaited_store(void* y) {
  return guarded([&] {
    const TensorMap map = make_tensor_map(y, DType::bf16, 64, 16, 128, 64, 16, Swizzle::b128);
    launch<unwaited_store>(Launch{{1}, 32, 2048}, map);
  });
}

KF_EXPORT run_unfenced_store(void* y) {
  return guarded([&] {
    const TensorMap map = make_tensor_map(y, DType::bf16, 64, 16, 128, 64, 16, Swizzle::b128);
    launch<unfenced_store>(Launch{{1}, 32, 2048}, map);
  });
}

KF_EXPORT use_seed(uint64_t seed) {
  return guarded([&] { emulation::settings().seed = seed; });
}

#endif
