"""The activations and their derivatives in Triton, on fp32 values."""

from __future__ import annotations

import triton
import triton.language as tl

# The numbers of `activation_numbers.ACTIVATIONS`.
RELU = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
SILU = tl.constexpr(3)
GELU = tl.constexpr(4)


@triton.jit
def activate(pre, ACTIVATION: tl.constexpr):
    """act(pre)."""
    value = pre
    if ACTIVATION == RELU:
        # Not maximum: NaN stays NaN.
        value = tl.where(pre <= 0.0, 0.0, pre)
    elif ACTIVATION == SIGMOID:
        value = tl.sigmoid(pre)
    elif ACTIVATION == SILU:
        value = pre * tl.sigmoid(pre)
    elif ACTIVATION == GELU:
        value = 0.5 * pre * (1.0 + tl.erf(pre * 0.7071067811865476))
    return value


@triton.jit
def derivative(pre, ACTIVATION: tl.constexpr):
    """act'(pre); at 0 relu's is 0."""
    value = tl.full(pre.shape, 1.0, tl.float32)
    if ACTIVATION == RELU:
        value = tl.where(pre <= 0.0, 0.0, 1.0)
    elif ACTIVATION == SIGMOID:
        gate = tl.sigmoid(pre)
        value = gate * (1.0 - gate)
    elif ACTIVATION == SILU:
        gate = tl.sigmoid(pre)
        value = gate * (1.0 + pre * (1.0 - gate))
    elif ACTIVATION == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * pre * pre)
        value = 0.5 * (1.0 + tl.erf(pre * 0.7071067811865476)) + pre * density
    return value
