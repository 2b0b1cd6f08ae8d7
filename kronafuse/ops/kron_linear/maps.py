"""One direction of one term, so that forward and backward are the same code on mirrored factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...planner import Choice, Order, choose
from ...shapes import KronShape
from .. import scales
from ..calls import as_dtype
from . import sums
from .terms import KronTerm

MIRRORED: dict[Order, Order] = {"a_first": "b_first", "b_first": "a_first", "low_rank": "low_rank"}


@lru_cache(maxsize=4096)
def _choice(n1: int, k1: int, n2: int, k2: int, rank: int | None) -> Choice:
    return choose(KronShape(n1, k1, n2, k2, rank))


@dataclass(
    eq=False, slots=True
)  # not frozen: two are made in a call, and freezing takes as long as a small GEMM
class KronMap:
    """out = scale · out_scale ⊙ (A ⊗ B)(in_scale ⊙ in), in a fixed order of multiplication.

    A is (O1, I1), B is (O2, I2) or b (O2, R) · b_down (R, I2); `in` has I1·I2 features and `out` O1·O2.
    A shuffled side has feature index i2·I1 + i1 instead of i1·I2 + i2. Factors are in the compute dtype where the
    backend asks for that, else in their own, and it casts them as it reads them. `dense_up` is the second product's
    dense form where the launch of the first has built it beside; `applied` says whether a second product follows, for
    which that is worth it.
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
    dense_up: Tensor | None = None
    applied: bool = True

    @classmethod
    def of(
        cls, term: KronTerm, dtype: torch.dtype | None, one: Callable[[Tensor], Tensor] = sums.one
    ) -> KronMap:
        """The forward map of a term, its factors cast to `dtype`; None: as they are. `one` makes a 1×1 identity."""
        a, b, b_down = term.a, term.b, term.b_down
        n1, k1 = (1, 1) if a is None else a.shape
        n2, inner = b.shape
        choice = (
            _choice(n1, k1, n2, inner, None)
            if b_down is None
            else _choice(n1, k1, n2, b_down.shape[1], inner)
        )
        if a is None and b_down is None:
            a = one(b)
        if dtype is not None:
            a = a if a is None else as_dtype(a, dtype)
            b = as_dtype(b, dtype)
            b_down = b_down if b_down is None else as_dtype(b_down, dtype)
        return cls(
            a, b, b_down, term.scale, choice.order, choice.thin, False, term.shuffled, None, term.row_scale
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
            self.out_shuffled,
            self.in_shuffled,
            self.out_scale,
            self.in_scale,
        )

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


def first_rows(kron: KronMap, x: Tensor) -> Tensor:
    """(M, I1·I2) seen as (M, G, F), F the features that the first factor contracts, without a copy."""
    view = kron.in_view(x)
    return view.mT if kron.order == "a_first" else view


def inner_rows(kron: KronMap, t: Tensor) -> Tensor:
    """T (M, inner) seen as (M, G, O): the products of the first factor with the rows of `first_rows`."""
    if kron.order == "a_first":
        return t.view(t.shape[0], kron.left[0], kron.right[1]).mT
    return t.view(t.shape[0], kron.left[1], first_factor(kron).shape[0])


def first_factor(kron: KronMap) -> Tensor:
    """The factor (O, F) that multiplies x first."""
    if kron.order == "a_first":
        assert kron.a is not None
        return kron.a
    return kron.b if kron.b_down is None else kron.b_down


def down_scale(kron: KronMap) -> float | Tensor:
    """The scale of the first product. With a low-rank B and a left factor `mix` applies it instead.

    Then P is unscaled and may overflow in fp16, so a scale of 0 that the host knows makes it 0 here already.
    """
    if kron.order != "low_rank" or kron.a is None:
        return kron.scale
    number = scales.on_host(kron.scale, kron.b.dtype)
    return 0.0 if not isinstance(number, Tensor) and number == 0 else 1.0


def first_scale(kron: KronMap) -> Tensor | None:
    """in_scale as (G, F)."""
    return None if kron.in_scale is None else first_rows(kron, kron.in_scale.unsqueeze(0)).squeeze(0)
