"""The trained factors of one adapter on one layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.kron_linear.terms import KronTerm
from .layout import Layout


class KronFactors(nn.Module):
    """scale · (A ⊗ B) as parameters.

    layout: sizes, start and dtype of the factors
    device: where they are made; "meta" works

    Parameter names begin with `lokr_`, and the module is none of those that layerwise casting stores in fp8:
    by either sign diffusers leaves them in their own dtype. The scale is a 0-d fp32 buffer, so that a new
    value never recompiles; it is saved with a model's state_dict, so that `to_empty` followed by
    `load_state_dict(assign=True)` restores it.
    """

    lokr_a: Tensor
    lokr_a_up: Tensor
    lokr_a_down: Tensor
    lokr_b: Tensor
    lokr_b_down: Tensor
    lokr_scale: Tensor

    def __init__(self, layout: Layout, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layout = layout
        for name, size in layout.sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=layout.dtype, device=device)))
        self.register_buffer("lokr_scale", torch.empty((), dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again as the spec says, with a delta of 0; torch's meta initialisation calls this by name."""
        for name, factor in self._parameters.items():
            assert factor is not None
            self.layout.start(name, factor)
        self.lokr_scale.fill_(self.layout.scale)

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

    def set_strength(self, strength: float) -> None:
        """scale := strength · the spec's scale, in place."""
        with torch.no_grad():
            self.lokr_scale.fill_(strength * self.layout.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KronFactors:
        before = self.lokr_scale
        super()._apply(fn, recurse)
        if self.lokr_scale.dtype != before.dtype and before.device.type != "meta":
            self.lokr_scale = before.to(
                self.lokr_scale.device
            )  # .half() is for the factors: alpha/R stays fp32
        return self

    def extra_repr(self) -> str:
        """The factors' sizes."""
        return str(self.layout)
