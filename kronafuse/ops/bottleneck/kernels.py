"""The bottleneck in Triton: one kernel forward; backward one over dy and the pre-activation, then the reductions.

Both kernels are a product into the hidden layer, a step on it on chip, and a product out of it, a block of rows a program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kron_linear.reduce_kernel import reduce_rows
from ..launch import architecture_of, launch
from ..outputs import new_output
from ..triton_common import dot, dot_precision, scale_arguments, scale_value
from . import tuning
from .call import Call, Gradients, Needs, result_dtype

RELU = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
SILU = tl.constexpr(3)
GELU = tl.constexpr(4)
ACTIVATIONS = {
    "identity": 0,
    "relu": RELU.value,
    "sigmoid": SIGMOID.value,
    "silu": SILU.value,
    "gelu": GELU.value,
}


@triton.jit
def _activate(pre, ACTIVATION: tl.constexpr):
    """act(pre) in fp32."""
    value = pre
    if ACTIVATION == RELU:
        value = tl.where(pre <= 0.0, 0.0, pre)
    elif ACTIVATION == SIGMOID:
        value = tl.sigmoid(pre)
    elif ACTIVATION == SILU:
        value = pre * tl.sigmoid(pre)
    elif ACTIVATION == GELU:
        value = 0.5 * pre * (1.0 + tl.erf(pre * 0.7071067811865476))
    return value


@triton.jit
def _derivative(pre, ACTIVATION: tl.constexpr):
    """act'(pre) in fp32."""
    value = pre * 0.0 + 1.0
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


@triton.jit
def _load_weight(w_ptr, offs_i, offs_o, I, O, stride_wi, stride_wo, EVEN_O: tl.constexpr):  # noqa: E741
    """(offs_i, offs_o) of a factor that takes I to O."""
    mask = (offs_i < I)[:, None]
    if not EVEN_O:
        mask = mask & (offs_o < O)[None, :]
    offsets = offs_i.to(tl.int64)[:, None] * stride_wi + offs_o.to(tl.int64)[None, :] * stride_wo
    return tl.load(w_ptr + offsets, mask=mask, other=0.0)
