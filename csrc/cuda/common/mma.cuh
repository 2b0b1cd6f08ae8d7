// Matrix fragments of a warp: ldmatrix and mma.m16n8k16 (A row-major, B column-major, fp32 accumulators).
// With g = lane / 4 and t = lane % 4:
//   A (16×16)  a[0]: row g,     k 2t, 2t+1    a[1]: row g + 8, the same k    a[2], a[3]: the same rows, k + 8
//   B (16×8)   b[0]: k 2t, 2t+1, column g     b[1]: k + 8
//   D (16×8)   d[0], d[1]: row g, columns 2t, 2t+1    d[2], d[3]: row g + 8
#pragma once

#include "cuda/common/platform.cuh"
#include "cuda/common/types.cuh"

namespace kronafuse::cuda {

#ifdef KRONAFUSE_EMULATED

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulation::ldmatrix(r, 4, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulation::ldmatrix(r, 4, row, true); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulation::ldmatrix(r, 2, row, false); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { emulation::ldmatrix(r, 2, row, true); }

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma_m16n8k16(d, a, b, dtype_of<T>);
}

#else

// Lane i gives the address (a multiple of 16) of row i % 8 of matrix i / 8; r[j] is matrix j's fragment.
KF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

KF_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

KF_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

KF_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// d += a · b.
template <class T>
KF_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#endif

}  // namespace kronafuse::cuda
