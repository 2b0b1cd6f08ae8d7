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
        return KronTerm(a, self.lokr_b, b_down, self.lokr_scale, layout.shuffled)

    def forward(self) -> KronTerm:
        """`term()`, through a call: hooks that bring offloaded factors back see it."""
        return self.term()
