"""Folding terms into a frozen weight, and giving the original back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ..ops.kron_merge.op import kron_merge
from .factors import KronFactors
from .fusing import module_reason


class MergedWeight:
    """W + Σ merged terms in the place of W.

    The original Parameter object is kept until every merged term is taken out again. Terms are always merged
    anew from the original, in the order in which they came, so that taking one out leaves exactly what the
    others alone would have made. `forget` frees the original and leaves the terms in the weight for good.
    """

    def __init__(self) -> None:
        self.original: nn.Parameter | None = None
        self.merged: list[KronFactors] = []
        self.final: list[KronFactors] = []

    def __bool__(self) -> bool:
        """Whether any term is in the weight."""
        return bool(self.merged or self.final)

    def __contains__(self, factors: KronFactors) -> bool:
        return any(each is factors for each in (*self.merged, *self.final))

    def add(self, name: str, base: nn.Module, factors: KronFactors) -> None:
        """Merge one more. Raises RuntimeError where the weight cannot be replaced, saying why."""
        reason = module_reason(base)
        if reason is not None:
            raise RuntimeError(f"merge: {name} cannot be merged: {reason}")
        assert isinstance(base, nn.Linear)
        original = cast(nn.Parameter, base.weight)
        base.weight = _replacement(original, _merged(original, factors))
        if self.original is None:
            self.original = original
        self.merged.append(factors)

    def take_out(self, name: str, base: nn.Module, factors: KronFactors) -> None:
        """Unmerge one. Raises RuntimeError after `forget`."""
        if any(each is factors for each in self.final):
            raise RuntimeError(f"unmerge: {name} was merged with keep=False, which freed the original weight")
        assert isinstance(base, nn.Linear)
        assert self.original is not None
        self.merged = [each for each in self.merged if each is not factors]
        if not self.merged:
            base.weight, self.original = self.original, None
            return
        weight: Tensor = self.original
        for each in self.merged:
            weight = _merged(weight, each)
        base.weight = _replacement(self.original, weight)

    def forget(self) -> None:
        """Free the original; what is merged stays merged."""
        self.final += self.merged
        self.original, self.merged = None, []

    def drop(self, factors: KronFactors) -> None:
        """Forget the record of a term that stays in the weight."""
        self.final = [each for each in self.final if each is not factors]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """`nn.Module._apply` for the kept original: it follows its layer to another device or dtype."""
        if self.original is not None:
            self.original.data = fn(self.original.data)


@torch.no_grad()
def _merged(weight: Tensor, factors: KronFactors) -> Tensor:
    term = factors.term()
    return kron_merge(weight, term.a, term.b, b_down=term.b_down, scale=term.scale, shuffled=term.shuffled)


def _replacement(like: Tensor, weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=like.requires_grad)
