"""The trained tensors of one adapter in one place, and the scale that goes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .spec import TensorLayout


class TrainedTensors(nn.Module):
    """Parameters as a layout says, and its scale as a 0-d fp32 buffer, so that a new value never recompiles.

    layout: sizes, start and dtype of the tensors
    device: where they are made; "meta" works

    The buffer, named SCALE, is saved with a model's state_dict, so that `to_empty` followed by
    `load_state_dict(assign=True)` restores it. The modules are none of those that diffusers' layerwise casting
    stores in fp8, so that the tensors stay in their own dtype.
    """

    SCALE: ClassVar[str]

    def __init__(self, layout: TensorLayout, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layout = layout
        for name, size in layout.sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=layout.dtype, device=device)))
        self.register_buffer(self.SCALE, torch.empty((), dtype=torch.float32, device=device))
        self.reset_parameters()

    @property
    def scale(self) -> Tensor:
        """What multiplies the delta: the layout's scale times the strength set last."""
        return self.get_buffer(self.SCALE)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again as the spec says; torch's meta initialisation calls this by name."""
        for name, tensor in self._parameters.items():
            assert tensor is not None
            self.layout.start(name, tensor)
        self.scale.fill_(self.layout.scale)

    def set_strength(self, strength: float) -> None:
        """scale := strength · the layout's scale, in place."""
        with torch.no_grad():
            self.scale.fill_(strength * self.layout.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainedTensors:
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != before.dtype and before.device.type != "meta":
            # .half() is for the trained tensors: alpha / R stays fp32
            setattr(self, self.SCALE, before.to(self.scale.device))
        return self

    def extra_repr(self) -> str:
        """The layout."""
        return str(self.layout)
