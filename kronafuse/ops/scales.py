"""A caller's scale and torch's GEMMs, which must never get it as alpha or beta when it is 0 to them.

With alpha = 0 torch neither reads the operands, so that a NaN in them is lost, nor writes every 16-bit result of a
batched product on a CPU. A scale of 0 therefore multiplies the smaller operand first. The product that follows is 0
for finite operands, whatever it would have been at a scale of 1, and NaN for infinite ones and NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import as_dtype

SMALLEST = 2.0**-150
"""The largest number that rounds to 0 in float32, in which scales are applied to all tensors but those of float64."""
NORMAL = 2.0**-126
"""Smaller numbers of float32 are 0 to a GEMM where the processor flushes them (torch.set_flush_denormal)."""


def on_host(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The scale as a number, rounded as it is applied to tensors of `dtype`; a tensor of another device stays one."""
    if not isinstance(scale, Tensor):
        return 0.0 if scale != 0 and vanishes(scale, dtype) else scale
    if scale.device.type != "cpu":
        return scale
    return as_dtype(scale, torch.float64 if dtype == torch.float64 else torch.float32).item()


def vanishes(scale: float, dtype: torch.dtype) -> bool:
    """Whether the number is 0 where it is applied to tensors of this dtype."""
    return scale == 0 or (dtype != torch.float64 and abs(scale) <= SMALLEST)


def split(factor: Tensor, scale: float | Tensor) -> tuple[Tensor, float, Tensor | None]:
    """(factor, alpha, rest): scale · product = rest · alpha · product of the new factor; alpha is never 0.

    alpha multiplies a GEMM's accumulator. A tensor that the host cannot read without waiting is `rest`, which
    multiplies the finished product. Before that a rest of 0 multiplies the factor, so that no product overflows.
    """
    number = on_host(scale, factor.dtype)
    if isinstance(number, Tensor):
        return factor * (number != 0), 1.0, number
    if abs(number) < NORMAL and (number == 0 or factor.dtype != torch.float64):
        return factor * number, 1.0, None
    return factor, number, None


def product(left: Tensor, right: Tensor, scale: float | Tensor) -> Tensor:
    """scale · left right of two matrices; a known scale multiplies the accumulator."""
    if right.numel() <= left.numel():
        right, alpha, rest = split(right, scale)
    else:
        left, alpha, rest = split(left, scale)
    if alpha == 1:
        return times(torch.mm(left, right), rest)
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)


def batched_product(left: Tensor, right: Tensor, scale: float | Tensor) -> Tensor:
    """scale · left right[m]: one matrix (O, I) and a batch (M, I, C) -> (M, O, C)."""
    left, alpha, rest = split(left, scale)
    batch = left.expand(right.shape[0], -1, -1)
    if alpha == 1:
        return times(torch.bmm(batch, right), rest)
    return torch.baddbmm(right.new_empty(()), batch, right, beta=0, alpha=alpha)


def times(out: Tensor, rest: Tensor | None) -> Tensor:
    """rest · out, in `out`'s dtype."""
    return out if rest is None else out * rest.to(out.dtype)
