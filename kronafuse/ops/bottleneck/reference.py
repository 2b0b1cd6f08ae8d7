"""`impl="reference"`: the definition's forward, and its backward written out, one line a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import BACKWARD, FORWARD
from .call import Call, Gradients, Needs, result_dtype
from .ref import bottleneck_ref, pre_activation


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor]:
    """(y, pre-activation where it is kept)."""
    x = call.x.to(call.dtype)
    y = bottleneck_ref(
        x,
        call.residual,
        call.down,
        call.up,
        down_bias=call.down_bias,
        up_bias=call.up_bias,
        activation=call.activation,
        scale=call.scale,
    )
    y = y.to(result_dtype(call.x, call.residual, call.dtype, call.residual_is_x)).contiguous()
    return y, pre_activation(x, call.down, call.down_bias) if keep else x.new_empty(0)


def backward(dy: Tensor, call: Call, pre: Tensor, needs: Needs) -> Gradients:
    """The gradients asked for; the others are None."""
    x, dtype = call.x.to(call.dtype), call.dtype
    dx = ddown = dup = ddown_bias = dup_bias = dscale = None
    low = dy.to(dtype)
    if needs.up_bias:
        assert call.up_bias is not None
        dup_bias = (call.scale * low.sum(0)).to(call.up_bias.dtype)
    if needs.hidden:
        hidden = FORWARD[call.activation](pre)
        through_up = low @ call.up.to(dtype)
        dpre = BACKWARD[call.activation]((call.scale * through_up).to(dtype), pre)
        if needs.x:
            dx = dpre @ call.down.to(dtype)
            dx = (dy + dx if call.residual_is_x else dx).to(call.x.dtype).contiguous()
        if needs.down:
            ddown = (dpre.t() @ x).to(call.down.dtype)
        if needs.down_bias:
            assert call.down_bias is not None
            ddown_bias = dpre.sum(0).to(call.down_bias.dtype)
        if needs.up:
            dup = (call.scale * (low.t() @ hidden)).to(call.up.dtype)
        if needs.scale:
            assert isinstance(call.scale, Tensor)
            dscale = (through_up * hidden).sum()
            if call.up_bias is not None:
                dscale = dscale + torch.dot(low.sum(0), call.up_bias.to(dtype))
            dscale = dscale.to(call.scale.dtype)
    return Gradients(dx, ddown, dup, ddown_bias, dup_bias, dscale)
