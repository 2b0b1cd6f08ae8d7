// TMA: copies of boxes of a tensor between global and shared memory by the bulk copy engine. Coordinates count
// elements, innermost first.
#pragma once

#include "common/view.h"
#include "cuda/common/platform.cuh"
#include "cuda/common/swizzle.cuh"

namespace kronafuse::cuda {

// A CUtensorMap; passed to a kernel as `const __grid_constant__ TensorMap`.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// One dimension of a tensor as TMA sees it; the innermost one has stride 1.
struct TensorExtent {
  int64_t size;
  int64_t stride_bytes;  // not read for the innermost dimension
  int box;
};

// Up to 4 dimensions, innermost first. What lies outside the tensor is read as zero and never written.
TensorMap make_tensor_map(const void* data, DType dtype, int dims, const TensorExtent* extents, Swizzle swizzle);

// Whether make_tensor_map can serve such a tensor: alignment, strides and sizes.
bool tensor_map_serves(const void* data, DType dtype, int dims, const TensorExtent* extents, Swizzle swizzle);

inline TensorMap make_tensor_map(const void* data, DType dtype, int64_t inner, int64_t outer,
                                 int64_t outer_stride_bytes, int box_inner, int box_outer, Swizzle swizzle) {
  const TensorExtent extents[2] = {{inner, size_of(dtype), box_inner}, {outer, outer_stride_bytes, box_outer}};
  return make_tensor_map(data, dtype, 2, extents, swizzle);
}

#ifdef KRONAFUSE_EMULATED

inline void tma_prefetch(const TensorMap& map) { emulation::tma_prefetch(&map); }

inline void tma_load(void* shared, const TensorMap& map, int inner, int outer, uint64_t* barrier) {
  const int at[2] = {inner, outer};
  emulation::tma_load(shared, &map, 2, at, barrier, emulation::own_block_mask());
}
inline void tma_load_3d(void* shared, const TensorMap& map, int inner, int middle, int outer, uint64_t* barrier) {
  const int at[3] = {inner, middle, outer};
  emulation::tma_load(shared, &map, 3, at, barrier, emulation::own_block_mask());
}
inline void tma_load_multicast(void* shared, const TensorMap& map, int inner, int outer, uint64_t* barrier,
                               uint16_t cta_mask) {
  const int at[2] = {inner, outer};
  emulation::tma_load(shared, &map, 2, at, barrier, cta_mask);
}
inline void tma_load_multicast_3d(void* shared, const TensorMap& map, int inner, int middle, int outer,
                                  uint64_t* barrier, uint16_t cta_mask) {
  const int at[3] = {inner, middle, outer};
  emulation::tma_load(shared, &map, 3, at, barrier, cta_mask);
}
inline void tma_store(const TensorMap& map, const void* shared, int inner, int outer) {
  const int at[2] = {inner, outer};
  emulation::tma_store(&map, shared, 2, at);
}
inline void tma_store_3d(const TensorMap& map, const void* shared, int inner, int middle, int outer) {
  const int at[3] = {inner, middle, outer};
  emulation::tma_store(&map, shared, 3, at);
}
inline void tma_store_commit() { emulation::tma_store_commit(); }
template <int N>
inline void tma_store_wait() {
  emulation::tma_store_wait(N);
}
template <int N>
inline void tma_store_wait_read() {
  emulation::tma_store_wait(N);
}

#else

KF_DEVICE void tma_prefetch(const TensorMap& map) {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// One thread; the box lands at `shared` and its bytes count at `barrier` when it has.
KF_DEVICE void tma_load(void* shared, const TensorMap& map, int inner, int outer, uint64_t* barrier) {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(inner), "r"(outer)
      : "memory");
#else
  __trap();
#endif
}

KF_DEVICE void tma_load_3d(void* shared, const TensorMap& map, int inner, int middle, int outer, uint64_t* barrier) {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(inner), "r"(middle), "r"(outer)
      : "memory");
#else
  __trap();
#endif
}

// The box lands at the same place of every block of the mask, and counts at each one's own barrier.
KF_DEVICE void tma_load_multicast(void* shared, const TensorMap& map, int inner, int outer, uint64_t* barrier,
                                  uint16_t cta_mask) {
#ifdef KRONAFUSE_HAS_SM90A
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(inner), "r"(outer), "h"(cta_mask)
      : "memory");
#else
  __trap();
#endif
}

KF_DEVICE void tma_load_multicast_3d(void* shared, const TensorMap& map, int inner, int middle, int outer,
                                     uint64_t* barrier, uint16_t cta_mask) {
#ifdef KRONAFUSE_HAS_SM90A
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(inner), "r"(middle), "r"(outer), "h"(cta_mask)
      : "memory");
#else
  __trap();
#endif
}

// After fence_async_shared() by the writers and a barrier; one thread.
KF_DEVICE void tma_store(const TensorMap& map, const void* shared, int inner, int outer) {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(inner), "r"(outer)
               : "memory");
#else
  __trap();
#endif
}

KF_DEVICE void tma_store_3d(const TensorMap& map, const void* shared, int inner, int middle, int outer) {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(inner), "r"(middle), "r"(outer)
               : "memory");
#else
  __trap();
#endif
}

KF_DEVICE void tma_store_commit() {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until at most N of this thread's committed groups are not yet written.
template <int N>
KF_DEVICE void tma_store_wait() {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Until at most N groups still read shared memory: the place may be used again. Needed before the block ends.
template <int N>
KF_DEVICE void tma_store_wait_read() {
#ifdef KRONAFUSE_HAS_SM90
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#endif
}

#endif

}  // namespace kronafuse::cuda
