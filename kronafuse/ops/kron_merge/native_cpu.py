"""The merge on the native CPU kernel: one pass over the weight, the sum in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ..outputs import new_output

_ops = native.cpu()
_merge, _cast = _ops.merge.default, _ops.cast.default
_ONE = torch.ones((1, 1))


def merge(
    weight: Tensor, a: Tensor | None, b: Tensor, b_down: Tensor | None, scale: Tensor, shuffled: bool
) -> Tensor:
    """W + scale · (A ⊗ B), (N, K) contiguous."""
    merged = new_output(weight, weight.shape)
    right = b if b_down is None else torch.mm(_wide(b), _wide(b_down))
    _merge(weight, _ONE if a is None else a, right, scale.item(), shuffled, merged)
    return merged


def _wide(factor: Tensor) -> Tensor:
    if factor.dtype == torch.float32:
        return factor
    out = new_output(factor, factor.shape, torch.float32)
    _cast(factor, out)
    return out
