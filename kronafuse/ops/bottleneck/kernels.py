"""The bottleneck in Triton: one kernel forward; backward one over dy and the pre-activation, then the reductions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kron_linear.reduce_kernel import reduce_rows
from ..outputs import new_output
from .activations import FORWARD
from .backward_kernel import backward_rows
from .call import Call, Gradients, Needs, scale_gradients
from .forward_kernel import forward as forward


def backward(dy: Tensor, call: Call, pre: Tensor, needs: Needs) -> Gradients:
    """The gradients asked for; the others are None."""
    dx = new_output(call.x, call.x.shape) if needs.x else None
    dpre = new_output(pre, pre.shape) if needs.down or needs.down_bias else None
    hidden = pre if call.activation == "identity" else None
    if dx is not None or dpre is not None:
        written = new_output(pre, pre.shape) if hidden is None and (needs.up or needs.scale) else None
        backward_rows(dy, call, pre, dx, written, dpre)
        hidden = written if hidden is None else hidden
    elif hidden is None and (needs.up or needs.scale):
        hidden = FORWARD[call.activation](pre)
    ddown, ddown_bias = _factor_gradients(
        dpre,
        call.x,
        call.down.dtype if needs.down else None,
        call.down_bias.dtype if needs.down_bias and call.down_bias is not None else None,
        1.0,
    )
    if needs.scale:
        # At scale 1 and in fp32 first: they are what the scale's own gradient is made of.
        bias = None if call.up_bias is None else torch.float32
        dup, dup_bias = _factor_gradients(dy, hidden, torch.float32, bias, 1.0)
        assert dup is not None
        dup, dup_bias, dscale = scale_gradients(call, needs, dup, dup_bias)
        return Gradients(dx, ddown, dup, ddown_bias, dup_bias, dscale)
    dup, dup_bias = _factor_gradients(
        dy,
        hidden,
        call.up.dtype if needs.up else None,
        call.up_bias.dtype if needs.up_bias and call.up_bias is not None else None,
        call.scale,
    )
    return Gradients(dx, ddown, dup, ddown_bias, dup_bias)


def _factor_gradients(
    left: Tensor | None,
    right: Tensor | None,
    dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    scale: float | Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """scale · leftᵀ right in `dtype`, scale · Σ left in `bias_dtype`, from one read of `left`; None for not needed."""
    gradient = sums = None
    if dtype is not None:
        assert left is not None
        assert right is not None
        if bias_dtype is not None:
            sums = new_output(left, left.shape[1:], bias_dtype)
        gradient = reduce_rows(left.unsqueeze(1), right.unsqueeze(1), scale, dtype, sums=sums)
    elif bias_dtype is not None:
        assert left is not None
        sums = (left.sum(0, dtype=torch.float32) * scale).to(bias_dtype)
    return gradient, sums
