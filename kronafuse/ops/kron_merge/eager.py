"""The merge on torch's own products: chunks of the delta, in the wide dtype."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ..kron_linear.maps import kron_view
from ..outputs import new_output

CHUNK_ELEMENTS = 1 << 20
"""Elements of the delta that exist at a time, in the wide dtype, but at least one row."""


def merge(
    weight: Tensor, a: Tensor | None, b: Tensor, b_down: Tensor | None, scale: Tensor, shuffled: bool
) -> Tensor:
    """W + scale · (A ⊗ B), (N, K) contiguous."""
    wide = wide_dtype(weight)
    left, right = dense_factors(a, b, b_down, wide)
    (n1, k1), (n2, k2) = left.shape, right.shape
    merged = new_output(weight, weight.shape)
    source, target = kron_blocks(weight, left, right, shuffled), kron_blocks(merged, left, right, shuffled)
    right_step = max(1, CHUNK_ELEMENTS // (n1 * k1 * k2))
    left_step = n1 if right_step > 1 else max(1, CHUNK_ELEMENTS // (k1 * k2))
    for first, second in product(range(0, n1, left_step), range(0, n2, right_step)):
        rows = slice(first, first + left_step), slice(second, second + right_step)
        delta = left[rows[0], None, :, None] * right[None, rows[1], None, :]
        target[rows] = delta.mul_(scale.to(wide)).add_(source[rows]).to(weight.dtype)
    return merged


def wide_dtype(weight: Tensor) -> torch.dtype:
    """What the sum is formed in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def dense_factors(
    a: Tensor | None, b: Tensor, b_down: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A and B = b · b_down, dense, in the wide dtype; the 1×1 identity where A is absent."""
    right = b.to(wide) if b_down is None else b.to(wide) @ b_down.to(wide)
    return (right.new_ones((1, 1)) if a is None else a.to(wide)), right


def kron_blocks(weight: Tensor, left: Tensor, right: Tensor, shuffled: bool) -> Tensor:
    """(N, K) seen as (N1, N2, K1, K2), without a copy."""
    rows = kron_view(weight.t(), left.shape[0], right.shape[0], shuffled)
    return rows.permute(1, 2, 0).unflatten(2, (left.shape[1], right.shape[1]))
