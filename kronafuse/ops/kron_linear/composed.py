"""Primitives made of two others, for backends that have no kernel with one read of x for several results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .maps import KronMap, first_rows, first_scale, inner_rows

Maps = Sequence[KronMap]
Dtypes = Sequence[torch.dtype]


def shrink_reduce_of(
    shrink: Callable[[Tensor, Maps], list[Tensor]], reduce: Callable[..., Tensor]
) -> Callable[[Tensor, Maps, Sequence[Tensor | None], Dtypes, Any], tuple[list[Tensor], list[Tensor | None]]]:
    """`shrink`, and Σ (in_scale ⊙ x)ᵀ other of each map's first factor, (F, O), one after the other."""

    def shrink_reduce(
        x: Tensor, maps: Maps, others: Sequence[Tensor | None], dtypes: Dtypes, stages: Any
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        gradients = [
            None
            if other is None
            else reduce(first_rows(kron, x), inner_rows(kron, other), 1.0, dtype, first_scale(kron))
            for kron, other, dtype in zip(maps, others, dtypes, strict=True)
        ]
        return shrink(x, maps), gradients

    return shrink_reduce


def reduce_shared_of(
    reduce: Callable[..., Tensor],
) -> Callable[[Tensor, Maps, Sequence[Tensor], Dtypes, Any], list[Tensor]]:
    """Σ otherᵀ x of each map's first factor, (O, F), one after the other."""

    def reduce_shared(
        x: Tensor, maps: Maps, others: Sequence[Tensor], dtypes: Dtypes, stages: Any
    ) -> list[Tensor]:
        return [
            reduce(inner_rows(kron, other), first_rows(kron, x), 1.0, dtype)
            for kron, other, dtype in zip(maps, others, dtypes, strict=True)
        ]

    return reduce_shared
