// The element types of the kernels, bf16 and f16, and how they meet float. Rounding is to nearest even.
#pragma once

#include <type_traits>

#include "common/view.h"
#include "cuda/common/half_bits.h"
#include "cuda/common/platform.cuh"

namespace kronafuse::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct Float2 {
  float x, y;
};

template <class T>
constexpr DType dtype_of = std::is_same_v<T, bf16>   ? DType::bf16
                           : std::is_same_v<T, f16>  ? DType::f16
                           : std::is_same_v<T, float> ? DType::f32
                                                      : DType::f64;

KF_HOST_DEVICE float to_float(bf16 value) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
#else
  return bf16_bits_to_float(value.bits);
#endif
}

KF_HOST_DEVICE float to_float(f16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return f16_bits_to_float(value.bits);
#endif
}

KF_HOST_DEVICE float to_float(float value) { return value; }

template <class T>
KF_HOST_DEVICE T from_float(float value) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    return value;
  } else {
    T result;
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<T, bf16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    }
#else
    if constexpr (std::is_same_v<T, bf16>) {
      result.bits = float_to_bf16_bits(value);
    } else {
      result.bits = float_to_f16_bits(value);
    }
#endif
    return result;
  }
}

// Two elements in one register, `low` at the lower address.
template <class T>
KF_HOST_DEVICE uint32_t pack2(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
#else
  return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

template <class T>
KF_HOST_DEVICE uint32_t pack2(T low, T high) {
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

template <class T>
KF_HOST_DEVICE Float2 unpack2(uint32_t packed) {
  return {to_float(T{static_cast<uint16_t>(packed & 0xffffu)}), to_float(T{static_cast<uint16_t>(packed >> 16)})};
}

// The value as T holds it, in float.
template <class T>
KF_HOST_DEVICE float round_to(float value) {
  return to_float(from_float<T>(value));
}

// An element of a factor that is kept in float or in T: as T holds it, in float.
template <class T>
KF_HOST_DEVICE float load_factor(const void* data, int64_t index, bool is_float32, T) {
  if (is_float32) return round_to<T>(static_cast<const float*>(data)[index]);
  return to_float(static_cast<const T*>(data)[index]);
}

// Calls body with a value of the element type that `dtype` names; for the two compute dtypes only.
template <class Body>
auto with_dtype(DType dtype, Body&& body) {
  KF_CHECK(dtype == DType::bf16 || dtype == DType::f16, "dtype must be float16 or bfloat16; got ", dtype);
  return dtype == DType::bf16 ? body(bf16{}) : body(f16{});
}

}  // namespace kronafuse::cuda
