"""The bottleneck in CUDA C++: one kernel forward; backward one over dy and the pre-activation, then the reductions."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import native
from ..outputs import new_output
from .activation_numbers import ACTIVATIONS
from .call import Call, Gradients, Needs, result_dtype, scale_gradients

CHUNK = 8
"""Elements that the kernels read at a time, 16 bytes of them."""
ROWS = 32
"""The fewest rows of a block: as many partial sums of a bias' gradient there may be."""


@cache
def _operator(device_type: str, name: str) -> Any:
    """An operator of the library, past what torch.ops looks up at every call."""
    return getattr(native.cuda(torch.device(device_type)), name).default


def forward(call: Call, keep: bool, config: int = -1) -> tuple[Tensor, Tensor]:
    """(y, pre-activation where it is kept)."""
    x, tokens = call.x, call.x.shape[0]
    dtype = result_dtype(x, call.residual, call.dtype, call.residual_is_x)
    y = new_output(x, (tokens, call.up.shape[0]), dtype)
    pre = new_output(x, (tokens, call.down.shape[0]) if keep else (0,), call.dtype)
    number, scale = _scale(call)
    _operator(x.device.type, "bottleneck_forward")(
        x,
        call.residual,
        call.down,
        call.up,
        call.down_bias,
        call.up_bias,
        scale,
        number,
        ACTIVATIONS[call.activation],
        config,
        _packed(call),
        y,
        pre,
    )
    return y, pre


def backward(dy: Tensor, call: Call, pre: Tensor, needs: Needs, config: int = -1) -> Gradients:
    """The gradients asked for; the others are None."""
    dx = new_output(call.x, call.x.shape) if needs.x else None
    dpre = new_output(pre, pre.shape) if needs.down else None
    hidden, written = None, None
    if needs.up or needs.scale:
        written = None if call.activation == "identity" else new_output(pre, pre.shape)
        hidden = pre if written is None else written
    ddown_bias = _like(call.down_bias) if needs.down_bias else None
    dup_bias = _like(call.up_bias) if needs.up_bias or needs.scale else None
    if needs.scale and dup_bias is not None:
        # At scale 1 and in fp32 first: it is what the scale's own gradient is made of.
        dup_bias = new_output(dup_bias, dup_bias.shape, torch.float32)
    outputs = (dx, written, dpre, ddown_bias, dup_bias)
    if any(each is not None for each in outputs):
        _rows(dy, call, pre, not needs.scale, config, *outputs)
    ddown = None if dpre is None else _reduce(dpre, _readable(call.x, call.dtype), 1.0, None, call.down.dtype)
    dy = dy if hidden is None else _readable(dy, call.dtype)
    if needs.scale:
        assert hidden is not None
        dup = _reduce(dy, hidden, 1.0, None, torch.float32)
        dup, dup_bias, dscale = scale_gradients(call, needs, dup, dup_bias)
        return Gradients(dx, ddown, dup, ddown_bias, dup_bias, dscale)
    dup = None if hidden is None else _reduce(dy, hidden, *_scale(call), call.up.dtype)
    return Gradients(dx, ddown, dup, ddown_bias, dup_bias)


def _rows(
    dy: Tensor,
    call: Call,
    pre: Tensor,
    scales_bias: bool,
    config: int,
    dx: Tensor | None,
    hidden: Tensor | None,
    dpre: Tensor | None,
    ddown_bias: Tensor | None,
    dup_bias: Tensor | None,
) -> None:
    """Fills what is given from one pass over dy and the pre-activation."""
    sums = None
    if ddown_bias is not None or dup_bias is not None:
        blocks = -(-dy.shape[0] // ROWS)
        sums = new_output(dy, (blocks * (call.up.shape[0] + call.down.shape[0]),), torch.float32)
    number, scale = _scale(call)
    _operator(dy.device.type, "bottleneck_backward")(
        dy,
        pre,
        call.down,
        call.up,
        scale,
        number,
        ACTIVATIONS[call.activation],
        call.residual_is_x,
        scales_bias,
        config,
        _packed(call),
        sums,
        dx,
        hidden,
        dpre,
        ddown_bias,
        dup_bias,
    )


def _reduce(left: Tensor, right: Tensor, number: float, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """number · scale · leftᵀ right in `dtype`; one of them in the compute dtype, the other in it or float32."""
    kind, p, q = left.device.type, left.unsqueeze(1), right.unsqueeze(1)
    workspace = new_output(p, (_operator(kind, "reduce_workspace")(p, q),), torch.float32)
    out = new_output(p, (left.shape[1], right.shape[1]), dtype)
    _operator(kind, "reduce")(p, q, None, number, scale, workspace, out)
    return out


def _readable(features: Tensor, dtype: torch.dtype) -> Tensor:
    """What the reduction reads as it is: the compute dtype and float32."""
    return features if features.dtype in (dtype, torch.float32) else features.to(dtype)


def _packed(call: Call) -> Tensor | None:
    """Room for the factors that the kernels cannot read as they are."""
    if _is_direct(call.down, call.dtype) and _is_direct(call.up, call.dtype):
        return None
    elements = sum(factor.shape[0] * -(-factor.shape[1] // CHUNK) * CHUNK for factor in (call.down, call.up))
    return new_output(call.x, (elements,), call.dtype)


def _is_direct(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels read this factor as it is: in the compute dtype, in aligned chunks."""
    return (
        factor.dtype == dtype
        and factor.stride(1) == 1
        and factor.stride(0) % CHUNK == 0
        and factor.shape[1] % CHUNK == 0
        and factor.data_ptr() % 16 == 0
    )


def _scale(call: Call) -> tuple[float, Tensor | None]:
    """The scale as a number beside a tensor that only the kernels read."""
    return (1.0, call.scale) if isinstance(call.scale, Tensor) else (float(call.scale), None)


def _like(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else new_output(bias, bias.shape)
