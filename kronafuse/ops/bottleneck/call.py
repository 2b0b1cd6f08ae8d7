"""The records that the raw ops hand to an implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One bottleneck on flat tokens.

    x:             (M, K)  in any dtype; rounded to `dtype` where it is multiplied
    residual:      (M, N)  in any dtype; x itself where `residual_is_x`; None for none
    down, up:      (H, K) and (N, H); rounded to `dtype`
    biases:        (H,) and (N,), or None; rounded to `dtype`
    scale:         float or 0-d tensor
    dtype:         what the products are computed in
    residual_is_x: dx contains dy
    """

    x: Tensor
    residual: Tensor | None
    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    scale: float | Tensor
    activation: str
    dtype: torch.dtype
    residual_is_x: bool


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    down: bool
    up: bool
    down_bias: bool
    up_bias: bool
    scale: bool

    @property
    def hidden(self) -> bool:
        """Whether any of them goes through the hidden layer: all but the up bias's do."""
        return self.x or self.down or self.up or self.down_bias or self.scale


class Gradients(NamedTuple):
    """Each in the dtype of its tensor; None where it is not asked for."""

    x: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    scale: Tensor | None = None


def result_dtype(x: Tensor, residual: Tensor | None, dtype: torch.dtype, residual_is_x: bool) -> torch.dtype:
    """y's dtype: the compute dtype, promoted with the residual's."""
    added = x if residual_is_x else residual
    return dtype if added is None else torch.promote_types(dtype, added.dtype)


def scale_gradients(
    call: Call, needs: Needs, dup: Tensor, dup_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(dup, dup_bias, dscale) from the first two at scale 1: the delta is linear in both and in the scale."""
    assert isinstance(call.scale, Tensor)
    wide = torch.promote_types(call.dtype, torch.float32)
    dup = dup.to(wide)
    dscale = (dup * call.up.to(wide)).sum()
    if call.up_bias is not None:
        assert dup_bias is not None
        dup_bias = dup_bias.to(wide)
        dscale = dscale + (dup_bias * call.up_bias.to(wide)).sum()
    return (
        (dup * call.scale).to(call.up.dtype).contiguous() if needs.up else None,
        (dup_bias * call.scale).to(call.up_bias.dtype)
        if dup_bias is not None and call.up_bias is not None and needs.up_bias
        else None,
        dscale.to(call.scale.dtype),
    )
