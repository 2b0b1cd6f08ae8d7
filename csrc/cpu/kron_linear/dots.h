// bf16 products two at a time, by the dot product instruction of AVX512-BF16: sums stay in fp32. For kernel files alone,
// as vector.h; asked for at run time, as not every processor with AVX-512 has it.
//
// Operands are words of two neighbours along what is summed: word (k/2, c) holds rows k and k + 1 of column c.
#pragma once

#include "cpu/common/vector.h"

#if defined(__AVX512F__)
#define KF_HAS_DOTS 1
#define KF_DOTS __attribute__((target("avx512bf16")))

namespace kronafuse::cpu::KRONAFUSE_LEVEL {

KF_INLINE Halves first_halves(const bf16* from, int64_t count) {
  const auto loaded = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(count >= kLanes ? 0xffff : (1u << count) - 1), from);
  Halves halves;
  __builtin_memcpy(&halves, &loaded, sizeof halves);
  return halves;
}

// Two rows as words, `second` absent where there is none: to[c] = first[c] | second[c] << 16. Rows of neighbours are
// written in whole vectors: zeros may follow the last word.
KF_INLINE void pair_rows(const bf16* first, const bf16* second, int64_t stride, int64_t columns, uint32_t* to) {
  int64_t c = 0;
  if (stride == 1) {
    for (; c < columns; c += kLanes) {
      const Halves low = first_halves(first + c, columns - c);
      const Halves high = second == nullptr ? Halves{} : first_halves(second + c, columns - c);
      const Words words = __builtin_convertvector(low, Words) | (__builtin_convertvector(high, Words) << 16);
      __builtin_memcpy(to + c, &words, sizeof words);
    }
  }
  for (; c < columns; ++c) {
    const uint32_t high = second == nullptr ? 0u : second[c * stride].bits;
    to[c] = first[c * stride].bits | (high << 16);
  }
}

// out[r, c] (+)= Σ_k a[k, r] b[k, c] for Rows rows and Vectors · 16 columns; depth counts words.
template <int Rows, int Vectors>
KF_DOTS static void outer_tile_dots(const uint32_t* a, int64_t depth, const uint32_t* b, int64_t b_stride,
                                    bool accumulate, float* out, int64_t out_stride) {
  __m512 sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; ++k) {
    __m512bh columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r]));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, columns[v]);
    }
    a += Rows;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* to = out + r * out_stride + v * kLanes;
      _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]) : sum[r][v]);
    }
  }
}

// out[i, j] += Σ_c p[i, c] q[j, c] for four rows of each; columns (of bf16, not words) are multiples of 32.
KF_DOTS static void inner_tile_dots(const bf16* p, int64_t p_stride, const bf16* q, int64_t q_stride, int64_t columns,
                                    float* out, int64_t out_stride) {
  __m512 sum[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < columns; c += 2 * kLanes) {
    __m512bh right[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) right[j] = (__m512bh)_mm512_loadu_si512(q + j * q_stride + c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512bh left = (__m512bh)_mm512_loadu_si512(p + i * p_stride + c);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Vector whole;
      __builtin_memcpy(&whole, &sum[i][j], sizeof whole);
      out[i * out_stride + j] += sum_of(whole);
    }
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
#endif
