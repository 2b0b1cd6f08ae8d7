"""The bottleneck on torch's own GEMMs, on any device: nothing M×N beyond y, nothing M×K beyond dx."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import scales
from ..calls import as_dtype
from .activations import BACKWARD, FORWARD
from .call import Call, Gradients, Needs, result_dtype, scale_gradients

CHUNK_ELEMENTS = 1 << 19
"""Elements of a product that exist at a time where it is added to, or becomes, another dtype."""
NARROW, NARROW_TOKENS = 64, 256
"""Up to this width, from so many tokens up, up's gradient is faster as the transpose of one; measured on CPUs."""
TINY = 16
"""Up to this width, from so many tokens up, a transposed copy of up is faster to multiply by; measured on CPUs."""
linear = torch.nn.functional.linear


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor]:
    """(y, pre-activation where it is kept)."""
    dtype = call.dtype
    down_bias = None if call.down_bias is None else as_dtype(call.down_bias, dtype)
    up_bias = None if call.up_bias is None else as_dtype(call.up_bias, dtype)
    pre = linear(as_dtype(call.x, dtype), as_dtype(call.down, dtype), down_bias)
    out_dtype = result_dtype(call.x, call.residual, dtype, call.residual_is_x)
    hidden = FORWARD[call.activation](pre)
    y = _add_linear(call.residual, hidden, as_dtype(call.up, dtype), up_bias, call.scale, out_dtype)
    return y, pre if keep else pre.new_empty(0)


def backward(dy: Tensor, call: Call, pre: Tensor, needs: Needs) -> Gradients:
    """The gradients asked for; the others are None."""
    dtype = call.dtype
    low = as_dtype(dy, dtype)
    dx = ddown = ddown_bias = None
    if needs.x or needs.down or needs.down_bias:
        up = as_dtype(call.up, dtype)
        weight = up.t()
        if up.shape[1] <= TINY and low.shape[0] >= NARROW_TOKENS:
            weight = weight.contiguous()
        dhidden = _add_linear(None, low, weight, None, call.scale, dtype)
        dpre = BACKWARD[call.activation](dhidden, pre)
        if needs.x:
            base = dy if call.residual_is_x else None
            dx = _add_linear(base, dpre, as_dtype(call.down, dtype).t(), None, 1.0, call.x.dtype)
        if needs.down:
            ddown = as_dtype(torch.mm(dpre.t(), as_dtype(call.x, dtype)), call.down.dtype)
        if needs.down_bias:
            assert call.down_bias is not None
            ddown_bias = as_dtype(dpre.sum(0), call.down_bias.dtype)
    dup, dup_bias, dscale = _up_gradients(low, call, pre, needs)
    return Gradients(dx, ddown, dup, ddown_bias, dup_bias, dscale)


def _up_gradients(
    low: Tensor, call: Call, pre: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of up, of its bias and of the scale."""
    dup = dup_bias = None
    if needs.up or needs.scale:
        hidden, scale = FORWARD[call.activation](pre), 1.0 if needs.scale else call.scale
        if hidden.shape[1] <= NARROW and hidden.shape[0] >= NARROW_TOKENS:
            dup = scales.product(hidden.t(), low, scale).t()
        else:
            dup = scales.product(low.t(), hidden, scale)
    if call.up_bias is not None and (needs.up_bias or needs.scale):
        # In 16 bits the sum may overflow before it meets the scale.
        dup_bias = low.sum(0, dtype=torch.promote_types(low.dtype, torch.float32))
    if needs.scale:
        assert dup is not None
        return scale_gradients(call, needs, dup, dup_bias)
    if dup is not None:
        dup = as_dtype(dup, call.up.dtype).contiguous()
    if dup_bias is not None:
        assert call.up_bias is not None
        dup_bias = as_dtype(dup_bias * call.scale, call.up_bias.dtype)
    return dup, dup_bias, None


def _add_linear(
    base: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """base + scale · (x weightᵀ + bias) in `dtype`, contiguous, without another tensor of its size.

    In 16 bits a bias goes into the product's rounding, which is finer than the sum's, not into a sum of its own.
    """
    if dtype != x.dtype or (base is not None and base.dtype != dtype):
        out = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
        step = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for first in range(0, x.shape[0], step):
            rows = slice(first, first + step)
            product = _add_linear(None, x[rows], weight, bias, scale, x.dtype)
            out[rows] = product if base is None else base[rows] + product
        return out
    weight, alpha, rest = scales.split(weight, scale)
    if bias is not None:
        bias = scales.split(bias, scale)[0]
    if rest is not None:
        delta = linear(x, weight, bias).mul_(rest)
        return delta if base is None else delta.add_(base)
    if bias is None:
        if base is not None:
            return torch.addmm(base, x, weight.t(), alpha=alpha)
        return scales.product(x, weight.t(), alpha)
    if base is None:
        return torch.addmm(bias, x, weight.t(), beta=alpha, alpha=alpha)
    if dtype in (torch.float16, torch.bfloat16) or not base.is_contiguous():
        delta = linear(x, weight, bias)
        return torch.add(base, delta, alpha=alpha, out=delta)
    return torch.add(base, bias, alpha=alpha).addmm_(x, weight.t(), alpha=alpha)
