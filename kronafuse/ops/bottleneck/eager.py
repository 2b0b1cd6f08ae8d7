"""The bottleneck on torch's own GEMMs, on any device: nothing M×N beyond y, nothing M×K beyond dx.

The up bias is one more column of the up layer, beside a hidden unit that is always 1: it costs no pass over y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import BACKWARD, FORWARD, FORWARD_INTO
from .call import Call, Gradients, Needs, result_dtype

CHUNK_ELEMENTS = 1 << 19
"""Elements of a product that exist at a time where it is added to a residual of another dtype."""


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor]:
    """(y, pre-activation where it is kept)."""
    x, dtype = call.x.to(call.dtype), call.dtype
    bias = None if call.down_bias is None else call.down_bias.to(dtype)
    pre = torch.nn.functional.linear(x, call.down.to(dtype), bias)
    alpha, rest = _alpha(call.scale)
    hidden, up = _hidden(pre, call.activation, call.up_bias is not None), _up_with_bias(call)
    if rest is not None:
        hidden = hidden * rest.to(dtype)
    out_dtype = result_dtype(call.x, call.residual, dtype, call.residual_is_x)
    y = _add_product(call.residual, hidden, up.t(), alpha, out_dtype)
    return y, pre if keep else pre.new_empty(0)


def backward(dy: Tensor, call: Call, pre: Tensor, needs: Needs) -> Gradients:
    """The gradients asked for; the others are None."""
    low, dtype = dy.to(call.dtype), call.dtype
    dx = ddown = ddown_bias = dscale = None
    if needs.x or needs.down or needs.down_bias or needs.scale:
        up = call.up.to(dtype)
        if needs.scale:
            through_up = low @ up
            dscale = _scale_gradient(low, call, pre, through_up)
            dhidden = through_up * (call.scale.to(dtype) if isinstance(call.scale, Tensor) else call.scale)
        else:
            dhidden = _scaled_product(low, up, call.scale)
        dpre = BACKWARD[call.activation](dhidden, pre)
        if needs.x:
            base = dy if call.residual_is_x else None
            dx = _add_product(base, dpre, call.down.to(dtype), 1.0, call.x.dtype)
        if needs.down:
            ddown = (dpre.t() @ call.x.to(dtype)).to(call.down.dtype)
        if needs.down_bias:
            assert call.down_bias is not None
            ddown_bias = dpre.sum(0).to(call.down_bias.dtype)
    return Gradients(dx, ddown, *_up_gradients(low, call, pre, needs, ddown_bias), dscale)


def _up_gradients(
    low: Tensor, call: Call, pre: Tensor, needs: Needs, ddown_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of up, down_bias (passed on) and up_bias; those of up and its bias are one product."""
    dup = dup_bias = None
    if needs.up:
        width = call.up.shape[1]
        product = _scaled_product(low.t(), _hidden(pre, call.activation, needs.up_bias), call.scale)
        dup = product[:, :width].to(call.up.dtype, memory_format=torch.contiguous_format)
        dup_bias = product[:, width] if needs.up_bias else None
    elif needs.up_bias:
        dup_bias = low.sum(0) * call.scale
    if dup_bias is not None:
        assert call.up_bias is not None
        dup_bias = dup_bias.to(call.up_bias.dtype, memory_format=torch.contiguous_format)
    return dup, ddown_bias, dup_bias


def _scale_gradient(low: Tensor, call: Call, pre: Tensor, through_up: Tensor) -> Tensor:
    """Σ dy ⊙ delta at scale 1, without the delta: through the hidden layer, and the bias's own part."""
    assert isinstance(call.scale, Tensor)
    gradient = (through_up * FORWARD[call.activation](pre)).sum(dtype=call.scale.dtype)
    if call.up_bias is not None:
        gradient = gradient + torch.dot(low.sum(0, dtype=call.scale.dtype), call.up_bias.to(call.scale.dtype))
    return gradient


def _hidden(pre: Tensor, activation: str, bias: bool) -> Tensor:
    """act(pre), (M, H); with the unit that carries a bias, (M, H + 1)."""
    if not bias:
        return FORWARD[activation](pre)
    hidden = pre.new_empty((pre.shape[0], pre.shape[1] + 1))
    FORWARD_INTO[activation](pre, hidden[:, :-1])
    hidden[:, -1] = 1
    return hidden


def _up_with_bias(call: Call) -> Tensor:
    """up (N, H); with its bias as one more column, (N, H + 1)."""
    up = call.up.to(call.dtype)
    return up if call.up_bias is None else torch.cat((up, call.up_bias.to(call.dtype)[:, None]), 1)


def _scaled_product(left: Tensor, right: Tensor, scale: float | Tensor) -> Tensor:
    """scale · left right; the scale multiplies the accumulator where it is known on the host."""
    alpha, rest = _alpha(scale)
    product = torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)
    return product if rest is None else product * rest.to(product.dtype)


def _add_product(
    base: Tensor | None, left: Tensor, right: Tensor, alpha: float, dtype: torch.dtype
) -> Tensor:
    """base + alpha · left right in `dtype`, contiguous; rounded once where all have one dtype."""
    if dtype == left.dtype:
        if base is None:
            return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)
        if base.dtype == dtype:
            return torch.addmm(base, left, right, alpha=alpha)
    rows, columns = left.shape[0], right.shape[1]
    out = left.new_empty((rows, columns), dtype=dtype)
    step = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        product = torch.addmm(left.new_empty(()), left[part], right, beta=0, alpha=alpha)
        if base is None:
            out[part] = product
        else:
            torch.add(base[part], product, out=out[part])
    return out


def _alpha(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """The scale as a GEMM's alpha; what cannot be one without a sync is left."""
    if not isinstance(scale, Tensor):
        return scale, None
    return (scale.item(), None) if scale.device.type == "cpu" else (1.0, scale)
