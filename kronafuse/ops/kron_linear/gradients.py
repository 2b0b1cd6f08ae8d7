"""The gradients of one term, by what they contract: dy with the saved T, x with dy's T, or the two T with each other.

A first:   dB = Σ Gᵀ U                      from dy        dA = Σ S Xᵀ            from x
B first:   dA = Σ G Vᵀ                      from dy        dB = Σ Qᵀ X            from x
low rank:  dB_up = Σ Gᵀ H                   from dy        dB_down = Σ Eᵀ X       from x        dA = s Σ F Pᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...planner import Order
from .maps import KronMap, first_rows, first_scale, inner_rows
from .terms import KronTerm

if TYPE_CHECKING:
    from .algorithm import Primitives
    from .sum_kernel import SecondStages

A, B, B_DOWN, SCALE, ROW_SCALE = range(5)
"""A term's gradients in the flat list."""
FROM_DY: dict[Order, int] = {"a_first": B, "b_first": A, "low_rank": B}
"""Order -> the factor whose gradient contracts dy."""
FROM_X: dict[Order, int] = {"a_first": A, "b_first": B, "low_rank": B_DOWN}
"""Order -> the factor whose gradient contracts x."""


@dataclass(eq=False)
class TermStep:
    """One term in backward: its maps, which of its gradients are asked for, and what is computed on the way.

    part:  T of forward, empty where it was not saved
    down:  the first product of dy on the adjoint map
    inner: what the adjoint's up map takes
    one_pass: whether dx takes dy itself instead
    forward_inner: what the up map took
    """

    kron: KronMap
    adjoint: KronMap
    needs: Sequence[bool]
    dtypes: Sequence[torch.dtype]
    part: Tensor
    down: Tensor | None = None
    inner: Tensor | None = None
    one_pass: bool = False
    forward_inner: Tensor | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, kron: KronMap, term: KronTerm, needs: Sequence[bool], part: Tensor) -> TermStep:
        """A term before anything is computed, with what forward saved of it."""
        factors = (term.a, term.b, term.b_down)
        dtypes = [term.b.dtype if each is None else each.dtype for each in factors]
        kron.applied = False
        return cls(kron, kron.adjoint(), needs, dtypes, part)

    def release(self) -> None:
        """Frees what only this layer's own part of backward takes."""
        self.part, self.down, self.forward_inner = self.part.new_empty(0), None, None
        self.adjoint.dense_up = None
        if not self.wants_from_x:
            self.inner = None

    @property
    def wants_from_dy(self) -> bool:
        """Whether the gradient that contracts dy is asked for."""
        return self.needs[FROM_DY[self.kron.order]]

    @property
    def wants_from_x(self) -> bool:
        """Whether the gradient that contracts x is asked for."""
        return self.needs[FROM_X[self.kron.order]]

    @property
    def wants_between(self) -> bool:
        """Whether the gradient of a low-rank term's left factor is asked for."""
        return self.kron.order == "low_rank" and self.needs[A]

    @property
    def needs_down(self) -> bool:
        """Whether a gradient of this term takes dy's first product."""
        return self.wants_from_x or self.wants_between

    @property
    def lacks_part(self) -> bool:
        """Whether a gradient takes T, which was not saved."""
        return self.part.numel() == 0 and (self.wants_from_dy or self.wants_between or self.needs[ROW_SCALE])


def gradient_from_dy(
    adjoint: KronMap,
    dy: Tensor,
    inner: Tensor,
    dtype: torch.dtype,
    primitives: Primitives,
    stages: SecondStages | None = None,
) -> Tensor:
    """The gradient that contracts dy, where dy's first product is not asked for; inner: U, V or H."""
    rows, scale = first_rows(adjoint, dy), first_scale(adjoint)
    return primitives.reduce(rows, inner_rows(adjoint, inner), 1.0, dtype, scale, stages)


def gradient_between(step: TermStep, primitives: Primitives, stages: SecondStages | None = None) -> Tensor:
    """dA of a low-rank term: s Σ F Pᵀ, of the two unscaled T."""
    assert step.down is not None
    f, p = inner_rows(step.adjoint, step.down), inner_rows(step.kron, step.part)  # (M, N1, R), (M, K1, R)
    return primitives.reduce(f.mT, p.mT, step.kron.scale, step.dtypes[A], None, stages)


def scale_gradient(kron: KronMap, dy: Tensor, x: Tensor, primitives: Primitives) -> Tensor:
    """Σ dy ⊙ (delta at scale 1), as the inner product of one factor with its own gradient."""
    kron = replace(kron, scale=1.0)
    adjoint = kron.adjoint()
    adjoint.applied = False
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if kron.order == "a_first":
        factor, down = kron.a, primitives.shrink(dy, [adjoint])[0]
        grad = primitives.reduce(inner_rows(kron, down), first_rows(kron, x), 1.0, wide)
    elif kron.order == "low_rank" and kron.a is not None:
        part, down = primitives.shrink(x, [kron])[0], primitives.shrink(dy, [adjoint])[0]
        factor = kron.a
        grad = gradient_between(TermStep(kron, adjoint, (), [wide], part, down), primitives)
    else:
        factor = kron.b if kron.order == "low_rank" else kron.a
        grad = gradient_from_dy(adjoint, dy, primitives.shrink(x, [kron])[0], wide, primitives)
    assert factor is not None
    return primitives.dot(factor, grad)


def row_scale_gradient(kron: KronMap, dy: Tensor, x: Tensor, inner: Tensor, primitives: Primitives) -> Tensor:
    """Σ_m dy[m] ⊙ (delta[m] without row_scale), (N,); inner: what the up map takes."""
    assert kron.out_scale is not None
    return primitives.row_dots(dy, x, replace(kron, out_scale=None), inner, kron.out_scale.dtype)
