"""The small primitives in torch's own operators, for backends that have no kernel of their own for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .maps import KronMap


def one(like: Tensor) -> Tensor:
    """The 1×1 identity in the dtype of `like`."""
    return like.new_ones((1, 1))


def sum_tokens(dy: Tensor) -> Tensor:
    """Σ over tokens of dy (M, N), (N,)."""
    return dy.sum(0)


def dot(factor: Tensor, gradient: Tensor) -> Tensor:
    """Σ factor ⊙ gradient, 0-d in the gradient's dtype, which is the wider."""
    return (factor.to(gradient.dtype) * gradient).sum()


def dots_of(dy: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over tokens of dy ⊙ delta, (N,) in `dtype`; the sum is in float32, of float64 tensors in float64."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return (dy.to(wide) * delta.to(wide)).sum(0).to(dtype)


def takes_in_parts(dy: Tensor, kron: KronMap) -> bool:
    """For backends whose backward has all tokens at once."""
    return False


def backward_in_parts(
    dy: Tensor, x: Tensor, kron: KronMap, dtypes: Sequence[torch.dtype | None], dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Never called there."""
    raise AssertionError("takes_in_parts refused it")
