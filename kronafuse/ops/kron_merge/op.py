"""`kron_merge`: a new weight with the delta folded in, without a dense delta in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ..kron_linear.maps import kron_view
from ..outputs import new_output

CHUNK_ELEMENTS = 1 << 20
"""Elements of the delta that exist at a time, in the wide dtype."""


def kron_merge(
    weight: Tensor,
    a: Tensor | None,
    b: Tensor,
    *,
    b_down: Tensor | None = None,
    scale: float | Tensor = 1.0,
    shuffled: bool = False,
) -> Tensor:
    """W + scale · (A ⊗ B), a new weight; the sum is formed in fp32 (fp64 for fp64) and rounded once.

    weight:   (N, K)     fp64, fp32, fp16 or bf16; any strides
    a:        (N1, K1)   left factor; None for the 1×1 identity
    b:        (N2, K2)   right factor, or (N2, R) with b_down
    b_down:   (R, K2)    B = b · b_down
    scale:    float or 0-d tensor
    shuffled: row n2·N1 + n1 of W takes what row n1·N2 + n2 of A ⊗ B holds

    Returns (N, K), contiguous, in the weight's dtype; differentiable in all tensors.
    Raises ValueError (shapes), TypeError (dtypes).
    """
    checks.check_merge("kron_merge", weight, a, b, b_down)
    checks.check_scale("kron_merge", scale, weight)
    tensor_scale = scale if isinstance(scale, Tensor) else weight.new_tensor(scale, dtype=_wide(weight))
    return _KronMerge.apply(shuffled, weight, a, b, b_down, tensor_scale)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class _KronMerge(torch.autograd.Function):
    @staticmethod
    def forward(
        shuffled: bool, weight: Tensor, a: Tensor | None, b: Tensor, b_down: Tensor | None, scale: Tensor
    ) -> Tensor:
        wide = _wide(weight)
        left, right = _dense_factors(a, b, b_down, wide)
        (n1, k1), (n2, k2) = left.shape, right.shape
        merged = new_output(weight, weight.shape)
        source, target = _blocks(weight, left, right, shuffled), _blocks(merged, left, right, shuffled)
        step = max(1, CHUNK_ELEMENTS // (n1 * k1 * k2))
        for first in range(0, n2, step):
            rows = slice(first, first + step)
            delta = left[:, None, :, None] * right[None, rows, None, :]
            target[:, rows] = delta.mul_(scale.to(wide)).add_(source[:, rows]).to(weight.dtype)
        return merged

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shuffled, weight, *factors = inputs
        ctx.dtype = weight.dtype
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, b_down, scale = ctx.saved_tensors
        (grad,) = grads
        wide = _wide(grad)
        left, right = _dense_factors(a, b, b_down, wide)
        blocks = _blocks(grad, left, right, ctx.shuffled).to(wide)  # (N1, N2, K1, K2)
        through_b = torch.einsum("ipjq,pq->ij", blocks, right)
        through_a = torch.einsum("ipjq,ij->pq", blocks, left)
        factor = scale.to(wide)
        db, db_down = factor * through_a, None
        if b_down is not None:
            db, db_down = db @ b_down.to(wide).t(), (b.to(wide).t() @ db).to(b_down.dtype)
        da = None if a is None else (factor * through_b).to(a.dtype)
        dscale = (through_b * left).sum().to(scale.dtype)
        return None, grad, da, db.to(b.dtype), db_down, dscale


def _dense_factors(
    a: Tensor | None, b: Tensor, b_down: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    right = b.to(wide) if b_down is None else b.to(wide) @ b_down.to(wide)
    return (right.new_ones((1, 1)) if a is None else a.to(wide)), right


def _blocks(weight: Tensor, left: Tensor, right: Tensor, shuffled: bool) -> Tensor:
    """(N, K) seen as (N1, N2, K1, K2), without a copy."""
    rows = kron_view(weight.t(), left.shape[0], right.shape[0], shuffled)
    return rows.permute(1, 2, 0).unflatten(2, (left.shape[1], right.shape[1]))
