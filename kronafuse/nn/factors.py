"""The trained factors of one Kronecker adapter on one layer."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..ops.kron_linear.terms import KronTerm
from .layout import Layout
from .trained import TrainedTensors


class KronFactors(TrainedTensors):
    """scale · (A ⊗ B) as parameters, whose names begin with `lokr_`: diffusers leaves those in their own dtype."""

    SCALE: ClassVar[str] = "lokr_scale"

    layout: Layout
    lokr_a: Tensor
    lokr_a_up: Tensor
    lokr_a_down: Tensor
    lokr_b: Tensor
    lokr_b_down: Tensor
    lokr_scale: Tensor

    def term(self) -> KronTerm:
        """What the operators take; A = A_up · A_down is multiplied out here, since no kernel splits A."""
        layout = self.layout
        a = None
        if layout.a_rank is not None:
            a = self.lokr_a_up @ self.lokr_a_down
        elif layout.has_a:
            a = self.lokr_a
        b_down = None if layout.shape.rank is None else self.lokr_b_down
        return KronTerm(a, self.lokr_b, b_down, self.scale_of_call(), layout.shuffled)

    def forward(self) -> KronTerm:
        """`term()`, through a call: hooks that bring offloaded factors back see it.

        A hook may exchange the memory of a parameter again when the call ends, so views of it are returned.
        """
        a, b, b_down, scale, shuffled, row_scale = self.term()
        a = None if a is None else a.view_as(a)
        b_down = None if b_down is None else b_down.view_as(b_down)
        return KronTerm(a, b.view_as(b), b_down, scale, shuffled, row_scale)
