"""One direction of one term, so that forward and backward are the same code on mirrored factors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...planner import Order, choose
from ...shapes import KronShape
from .terms import KronTerm

MIRRORED: dict[Order, Order] = {"a_first": "b_first", "b_first": "a_first", "low_rank": "low_rank"}


@dataclass(frozen=True)
class KronMap:
    """out = scale · out_scale ⊙ (A ⊗ B)(in_scale ⊙ in), in a fixed order of multiplication.

    A is (O1, I1), B is (O2, I2) or b (O2, R) · b_down (R, I2); `in` has I1·I2 features and `out` O1·O2.
    A shuffled side has feature index i2·I1 + i1 instead of i1·I2 + i2. Factors are in the compute dtype.
    """

    a: Tensor | None
    b: Tensor
    b_down: Tensor | None
    scale: float | Tensor
    order: Order
    thin: bool
    in_shuffled: bool = False
    out_shuffled: bool = False
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None

    @classmethod
    def of(cls, term: KronTerm, dtype: torch.dtype) -> KronMap:
        """The forward map of a term, its factors cast to `dtype`."""
        choice = choose(KronShape.of(term.a, term.b, term.b_down))
        a = term.a
        if a is None and term.b_down is None:
            a = term.b.new_ones((1, 1))
        return cls(
            None if a is None else a.to(dtype),
            term.b.to(dtype),
            None if term.b_down is None else term.b_down.to(dtype),
            term.scale,
            choice.order,
            choice.thin,
            out_shuffled=term.shuffled,
            out_scale=term.row_scale,
        )

    def adjoint(self) -> KronMap:
        """The map of dy: transposed factors, in the mirrored order; a shuffled side stays with its features."""
        return KronMap(
            None if self.a is None else self.a.t(),
            self.b.t() if self.b_down is None else self.b_down.t(),
            None if self.b_down is None else self.b.t(),
            self.scale,
            MIRRORED[self.order],
            self.thin,
            in_shuffled=self.out_shuffled,
            out_shuffled=self.in_shuffled,
            in_scale=self.out_scale,
            out_scale=self.in_scale,
        )

    def unscaled(self) -> KronMap:
        """The same map with scale 1."""
        return replace(self, scale=1.0)

    @property
    def left(self) -> tuple[int, int]:
        """(O1, I1)"""
        return (1, 1) if self.a is None else (self.a.shape[0], self.a.shape[1])

    @property
    def right(self) -> tuple[int, int]:
        """(O2, I2)"""
        return self.b.shape[0], self.b.shape[1] if self.b_down is None else self.b_down.shape[1]

    @property
    def inner(self) -> tuple[int, int]:
        """Sizes of T per token: (O1, I2) A first, (I1, O2) B first, (O1, R) low rank."""
        if self.order == "a_first":
            return self.left[0], self.right[1]
        if self.order == "b_first":
            return self.left[1], self.right[0]
        return self.left[0], self.b.shape[1]

    def in_view(self, x: Tensor) -> Tensor:
        """(M, I1·I2) seen as (M, I1, I2), without a copy."""
        return kron_view(x, self.left[1], self.right[1], self.in_shuffled)

    def out_view(self, y: Tensor) -> Tensor:
        """(M, O1·O2) seen as (M, O1, O2), without a copy."""
        return kron_view(y, self.left[0], self.right[0], self.out_shuffled)


def kron_view(x: Tensor, left: int, right: int, shuffled: bool) -> Tensor:
    """(M, left·right) seen as (M, left, right), without a copy."""
    # Splitting a dimension is a view whatever the strides; Tensor.unflatten does it through Python.
    if shuffled:
        return x.view(x.shape[0], right, left).transpose(1, 2)
    return x.view(x.shape[0], left, right)
