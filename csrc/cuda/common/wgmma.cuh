// wgmma: products of a warpgroup, m64nNk16, whose operands are read from shared memory by descriptors (A also from
// registers). Accumulators: with w the warp in its group, g = lane / 4, t = lane % 4, acc[4 j + 2 h + i] is row
// 16 w + g + 8 h, column 8 j + 2 t + i. A in registers is laid out as for mma.m16n8k16, rows 16 w to 16 w + 15.
#pragma once

#include "cuda/common/platform.cuh"
#include "cuda/common/swizzle.cuh"
#include "cuda/common/types.cuh"
#ifndef KRONAFUSE_EMULATED
#include "cuda/common/wgmma_registers.cuh"
#endif

namespace kronafuse::cuda {

// A matrix descriptor: address, leading and stride byte offsets (all divided by 16, 14 bits each) and the swizzle.
//   K-major, rows of one span of K:   stride = bytes from 8 rows to the next 8; leading is not read.
//   MN-major, rows of one span of MN: stride = bytes from 8 K-rows to the next 8, leading = from a span of MN to the next.
KF_DEVICE uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes,
                                    Swizzle swizzle = Swizzle::b128) {
#ifdef KRONAFUSE_EMULATED
  const uint32_t address = emulation::shared_address(shared);
#else
  const uint32_t address = shared_address(shared);
#endif
  const uint64_t layout = swizzle == Swizzle::none ? 0 : 4 - static_cast<int>(swizzle);
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>((leading_bytes & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3ffff) >> 4) << 32 | layout << 62;
}

// A tile of rows of K, one swizzle span (64 elements at 128 bytes) wide, as a TMA box (span, rows) lies.
KF_DEVICE uint64_t wgmma_descriptor_k_major(const void* shared, Swizzle swizzle = Swizzle::b128) {
  return wgmma_descriptor(shared, 16, 8 * span_of(swizzle), swizzle);
}

// Tiles one span of N wide and `k_rows` deep, one behind the other, as TMA boxes (span, k_rows) lie: for TransB.
KF_DEVICE uint64_t wgmma_descriptor_mn_major(const void* shared, int k_rows, Swizzle swizzle = Swizzle::b128) {
  return wgmma_descriptor(shared, static_cast<uint32_t>(k_rows * span_of(swizzle)), 8 * span_of(swizzle), swizzle);
}

// The descriptor of a place `bytes` further: 32 for the next 16 of K (K-major), 16 spans (MN-major).
KF_DEVICE uint64_t wgmma_advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

#ifdef KRONAFUSE_EMULATED

inline void wgmma_fence() { emulation::wgmma_fence(); }
inline void wgmma_commit() { emulation::wgmma_commit(); }
template <int N>
inline void wgmma_wait() {
  emulation::wgmma_wait(N);
}
template <int Count>
inline void wgmma_fence_operands(float (&)[Count]) {}

template <int N, class T, bool TransB = false>
inline void wgmma_m64k16(float (&acc)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  emulation::wgmma(acc, N, dtype_of<T>, nullptr, a, b, TransB, accumulate);
}
template <int N, class T, bool TransB = false>
inline void wgmma_m64k16(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulation::wgmma(acc, N, dtype_of<T>, a, 0, b, TransB, accumulate);
}

#else

// Before the first wgmma, and after other instructions have touched its registers.
KF_DEVICE void wgmma_fence() {
#ifdef KRONAFUSE_HAS_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

KF_DEVICE void wgmma_commit() {
#ifdef KRONAFUSE_HAS_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most N committed groups are unfinished: accumulators may be read, operands overwritten.
template <int N>
KF_DEVICE void wgmma_wait() {
#ifdef KRONAFUSE_HAS_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// Keeps the compiler from moving accumulators across the asynchronous products.
template <int Count>
KF_DEVICE void wgmma_fence_operands(float (&acc)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// The instruction for one N: COUNT accumulators, then A (one descriptor or four registers), B, the predicate, B's
// orientation.
#define KF_WGMMA_SHARED(N, COUNT, A, B, P, TRANS, TYPE)                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" KF_REGISTERS_##COUNT \
               "}, %" #A ", %" #B ", p, 1, 1, 0, %" #TRANS ";\n}\n"                                   \
               : KF_OPERANDS_##COUNT(acc)                                                             \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TransB ? 1 : 0))

#define KF_WGMMA_REGISTERS(N, COUNT, A0, A1, A2, A3, B, P, TRANS, TYPE)                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" KF_REGISTERS_##COUNT \
               "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TRANS ";\n}\n"      \
               : KF_OPERANDS_##COUNT(acc)                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
                 "n"(TransB ? 1 : 0))

#define KF_WGMMA_CASE(FORM, SIZE, ...)              \
  if constexpr (N == SIZE) {                        \
    if constexpr (std::is_same_v<T, bf16>) {        \
      FORM(SIZE, __VA_ARGS__, "bf16");              \
    } else {                                        \
      FORM(SIZE, __VA_ARGS__, "f16");               \
    }                                               \
  }

// acc = (accumulate ? acc : 0) + A · Bᵀ, with A 64×16 and B N×16; TransB: B lies N-contiguous.
template <int N, class T, bool TransB = false>
KF_DEVICE void wgmma_m64k16(float (&acc)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 160 || N == 192 || N == 256);
#ifdef KRONAFUSE_HAS_SM90A
  KF_WGMMA_CASE(KF_WGMMA_SHARED, 64, 32, 32, 33, 34, 35)
  KF_WGMMA_CASE(KF_WGMMA_SHARED, 96, 48, 48, 49, 50, 51)
  KF_WGMMA_CASE(KF_WGMMA_SHARED, 128, 64, 64, 65, 66, 67)
  KF_WGMMA_CASE(KF_WGMMA_SHARED, 160, 80, 80, 81, 82, 83)
  KF_WGMMA_CASE(KF_WGMMA_SHARED, 192, 96, 96, 97, 98, 99)
  KF_WGMMA_CASE(KF_WGMMA_SHARED, 256, 128, 128, 129, 130, 131)
#else
  __trap();
#endif
}

template <int N, class T, bool TransB = false>
KF_DEVICE void wgmma_m64k16(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 160 || N == 192 || N == 256);
#ifdef KRONAFUSE_HAS_SM90A
  KF_WGMMA_CASE(KF_WGMMA_REGISTERS, 64, 32, 32, 33, 34, 35, 36, 37, 38)
  KF_WGMMA_CASE(KF_WGMMA_REGISTERS, 96, 48, 48, 49, 50, 51, 52, 53, 54)
  KF_WGMMA_CASE(KF_WGMMA_REGISTERS, 128, 64, 64, 65, 66, 67, 68, 69, 70)
  KF_WGMMA_CASE(KF_WGMMA_REGISTERS, 160, 80, 80, 81, 82, 83, 84, 85, 86)
  KF_WGMMA_CASE(KF_WGMMA_REGISTERS, 192, 96, 96, 97, 98, 99, 100, 101, 102)
  KF_WGMMA_CASE(KF_WGMMA_REGISTERS, 256, 128, 128, 129, 130, 131, 132, 133, 134)
#else
  __trap();
#endif
}

#undef KF_WGMMA_CASE
#undef KF_WGMMA_SHARED
#undef KF_WGMMA_REGISTERS

#endif

}  // namespace kronafuse::cuda
