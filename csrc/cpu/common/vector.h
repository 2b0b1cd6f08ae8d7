// Vectors of floats as wide as the level's registers, loaded from and stored to fp32 and bf16.
//
// For kernel files alone, which are compiled once per level: everything here has internal linkage, so that no copy
// made for a wider level can be linked into a narrower one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef KRONAFUSE_LEVEL
#error "vector.h is for kernel files, which are compiled with KRONAFUSE_LEVEL defined"
#endif

#define KF_INLINE static inline __attribute__((always_inline))

namespace kronafuse::cpu::KRONAFUSE_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

KF_INLINE Vector broadcast(float value) { return Vector{} + value; }

KF_INLINE Vector widen(Halves halves) {
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector out;
  __builtin_memcpy(&out, &words, sizeof out);
  return out;
}

// To nearest, ties to even; NaN stays NaN.
KF_INLINE Halves narrow(Vector value) {
  Words bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  const auto is_nan = value != value;
  return __builtin_convertvector(is_nan ? quiet : rounded, Halves);
}

KF_INLINE Vector load(const float* from) {
  Vector out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
}

KF_INLINE Vector load(const bf16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return widen(halves);
}

KF_INLINE void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

KF_INLINE void store(bf16* to, Vector value) {
  const Halves halves = narrow(value);
  __builtin_memcpy(to, &halves, sizeof halves);
}

KF_INLINE float to_float(float value) { return value; }

KF_INLINE float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

KF_INLINE void put(float* to, float value) { *to = value; }

KF_INLINE void put(bf16* to, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = value != value ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(rounded);
}

// The first `count` lanes (1 to kLanes) from memory, the others 0: nothing past them is touched.
#if defined(__AVX512F__)
KF_INLINE Vector load_first(const float* from, int count) {
  const auto loaded = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
  Vector out;
  __builtin_memcpy(&out, &loaded, sizeof out);
  return out;
}

KF_INLINE Vector load_first(const bf16* from, int count) {
  const auto loaded = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  Halves halves;
  __builtin_memcpy(&halves, &loaded, sizeof halves);
  return widen(halves);
}

KF_INLINE void store_first(float* to, Vector value, int count) {
  __m512 whole;
  __builtin_memcpy(&whole, &value, sizeof whole);
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), whole);
}

KF_INLINE void store_first(bf16* to, Vector value, int count) {
  const Halves halves = narrow(value);
  __m256i whole;
  __builtin_memcpy(&whole, &halves, sizeof whole);
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), whole);
}
#else
template <class T>
KF_INLINE Vector load_first(const T* from, int count) {
  Vector out = {};
  for (int lane = 0; lane < count; ++lane) out[lane] = to_float(from[lane]);
  return out;
}

template <class T>
KF_INLINE void store_first(T* to, Vector value, int count) {
  for (int lane = 0; lane < count; ++lane) put(to + lane, value[lane]);
}
#endif

KF_INLINE float sum_of(Vector value) {
  float total = 0;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) value[lane] += value[lane + half];
  }
  total = value[0];
  return total;
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
