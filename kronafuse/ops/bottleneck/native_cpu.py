"""The bottleneck in C++ for CPUs: torch's products and native passes between them, one operator each way."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ... import native
from ..outputs import new_output
from .activation_numbers import ACTIVATIONS
from .call import Call, Gradients, Needs, result_dtype


@cache
def _operators() -> tuple[Any, Any]:
    """Forward and backward, past what torch.ops looks up at every call."""
    ops = native.cpu()
    return ops.bottleneck_forward.default, ops.bottleneck_backward.default


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor]:
    """(y, pre-activation where it is kept)."""
    x, tokens = call.x, call.x.shape[0]
    dtype = result_dtype(x, call.residual, call.dtype, call.residual_is_x)
    y = new_output(x, (tokens, call.up.shape[0]), dtype)
    pre = new_output(x, (tokens, call.down.shape[0]) if keep else (0,), call.dtype)
    number, scale = _scale(call)
    _operators()[0](
        x,
        call.residual,
        call.down,
        call.up,
        call.down_bias,
        call.up_bias,
        scale,
        number,
        ACTIVATIONS[call.activation],
        y,
        pre,
    )
    return y, pre


def backward(dy: Tensor, call: Call, pre: Tensor, needs: Needs) -> Gradients:
    """The gradients asked for; the others are None."""
    number, scale = _scale(call)
    likes = (call.x, call.down, call.up, call.down_bias, call.up_bias, scale)
    grads = [
        new_output(like, like.shape) if needed and like is not None else None
        for like, needed in zip(likes, needs, strict=True)
    ]
    _operators()[1](
        dy,
        call.x if needs.down else None,
        pre,
        call.down,
        call.up,
        call.up_bias,
        scale,
        number,
        ACTIVATIONS[call.activation],
        call.residual_is_x,
        *grads,
    )
    return Gradients(*grads)


def _scale(call: Call) -> tuple[float, Tensor | None]:
    """The scale as a number beside a tensor that only the library reads."""
    return (1.0, call.scale) if isinstance(call.scale, Tensor) else (float(call.scale), None)
