// The activations and their derivatives on vectors of floats; for kernel files alone (see cpu/common/vector.h).
#pragma once

#include "cpu/common/vector.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {

typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

KF_INLINE Vector between(Vector value, float low, float high) {
  // NaN compares false, and stays.
  value = value < broadcast(low) ? broadcast(low) : value;
  return value > broadcast(high) ? broadcast(high) : value;
}

// e^value to 1.1e-7, 0 below and 1.7e38 above what float32 holds as normal numbers; NaN stays NaN.
KF_INLINE Vector exponential(Vector value) {
  const Vector clamped = between(value, -87.0f, 88.0f);
  // Adding 1.5·2²³ leaves the nearest integer in the last bits.
  const Vector shifter = broadcast(12582912.0f);
  const Vector shifted = clamped * 1.44269504f + shifter;
  const Vector count = shifted - shifter;
  const Vector rest = (clamped - count * 0.693359375f) + count * 2.12194440e-4f;
  // Minimax of (e^r - 1 - r) / r² over |r| <= ln 2 / 2.
  Vector sum = broadcast(0.0013814606f);
  sum = sum * rest + 0.0083687107f;
  sum = sum * rest + 0.0416683890f;
  sum = sum * rest + 0.1666652113f;
  sum = sum * rest + 0.4999999404f;
  const Vector fraction = sum * (rest * rest) + rest + 1.0f;
  Integers bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const Integers exponent = (bits << 23) + (127 << 23);
  Vector power;
  __builtin_memcpy(&power, &exponent, sizeof power);
  const Vector result = fraction * power;
  return value < broadcast(-87.0f) ? Vector{} : result;
}

struct Gate {
  Vector open;    // sigmoid(value)
  Vector closed;  // 1 - sigmoid(value), to its own last digit
};

KF_INLINE Gate gate_of(Vector value) {
  const Vector power = exponential(-value);
  const Vector open = 1.0f / (1.0f + power);
  // Below what a normal number holds it is 0: times a huge value, the exponential's bound would be no small number.
  return {value < broadcast(-88.0f) ? Vector{} : open, open * power};
}

struct Normal {
  Vector area;     // Φ(value)
  Vector density;  // φ(value)
};

// The normal distribution to 2e-7 of itself, on both sides: erfc(t) = v e^(-t²) Q(v) with v = 1 / (1 + 0.35 t), where
// Q is the minimax polynomial over all t >= 0.
KF_INLINE Normal normal(Vector value) {
  const Vector size = value < Vector{} ? -value : value;
  const Vector bell = exponential(-0.5f * value * value);
  const Vector v = 1.0f / (1.0f + size * (0.35f * 0.707106781f));
  Vector sum = broadcast(0.0393621475f);
  sum = sum * v - 0.1678421497f;
  sum = sum * v + 0.2107482255f;
  sum = sum * v - 0.0771690905f;
  sum = sum * v + 0.1360334158f;
  sum = sum * v + 0.1160360128f;
  sum = sum * v + 0.1626181602f;
  sum = sum * v + 0.1852782071f;
  sum = sum * v + 0.1974686831f;
  sum = sum * v + 0.1974663436f;
  const Vector tail = 0.5f * v * bell * sum;
  return {value < Vector{} ? tail : 1.0f - tail, bell * 0.398942280f};
}

// The numbers that kronafuse/ops/bottleneck/activation_numbers.py gives them.
enum Activation : int { IDENTITY = 0, RELU = 1, SIGMOID = 2, SILU = 3, GELU = 4 };

template <int ACTIVATION>
KF_INLINE Vector activate(Vector pre) {
  // Not the maximum: NaN stays NaN.
  if constexpr (ACTIVATION == RELU) return pre <= Vector{} ? Vector{} : pre;
  if constexpr (ACTIVATION == SIGMOID) return gate_of(pre).open;
  if constexpr (ACTIVATION == SILU) return pre * gate_of(pre).open;
  if constexpr (ACTIVATION == GELU) return pre * normal(pre).area;
  return pre;
}

// act(pre), and act'(pre) in `slope`; at 0 relu's is 0.
template <int ACTIVATION>
KF_INLINE Vector activate(Vector pre, Vector& slope) {
  if constexpr (ACTIVATION == RELU) {
    slope = pre <= Vector{} ? Vector{} : broadcast(1.0f);
    return activate<RELU>(pre);
  } else if constexpr (ACTIVATION == SIGMOID) {
    const Gate gate = gate_of(pre);
    slope = gate.open * gate.closed;
    return gate.open;
  } else if constexpr (ACTIVATION == SILU) {
    const Gate gate = gate_of(pre);
    slope = gate.open * (1.0f + pre * gate.closed);
    return pre * gate.open;
  } else if constexpr (ACTIVATION == GELU) {
    const Normal at = normal(pre);
    slope = at.area + pre * at.density;
    return pre * at.area;
  } else {
    slope = broadcast(1.0f);
    return pre;
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
