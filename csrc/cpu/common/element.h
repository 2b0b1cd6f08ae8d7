// One element of a view as a float, and back: for factors, scales and results, which are small.
#pragma once

#include <cstring>

#include "common/view.h"

namespace kronafuse::cpu {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bf16_to_float(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

// To nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (fraction << 13));
  if (exponent > 0) return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

// To nearest, ties to even: where float's own addition rounds at half precision's last place.
inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    const uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

inline float load_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::f64: return static_cast<float>(static_cast<const double*>(data)[index]);
    case DType::f32: return static_cast<const float*>(data)[index];
    case DType::bf16: return bf16_to_float(static_cast<const uint16_t*>(data)[index]);
    default: return f16_to_float(static_cast<const uint16_t*>(data)[index]);
  }
}

inline void store_element(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[index] = value; break;
    case DType::f32: static_cast<float*>(data)[index] = value; break;
    case DType::bf16: static_cast<uint16_t*>(data)[index] = float_to_bf16(value); break;
    default: static_cast<uint16_t*>(data)[index] = float_to_f16(value);
  }
}

// As a compute dtype would hold it: factors of another dtype are cast before they multiply.
inline float rounded_to(DType dtype, float value) {
  return dtype == DType::bf16 ? bf16_to_float(float_to_bf16(value)) : value;
}

}  // namespace kronafuse::cpu
