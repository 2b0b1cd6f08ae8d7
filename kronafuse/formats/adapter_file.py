"""What an adapter file holds, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..nn.spec import Spec


@dataclass(frozen=True)
class AdapterFile:
    """An adapter without its model: `attach(model, file)` puts it on one.

    spec:    how the factors were made
    modules: module name -> (N, K) of every adapted layer or block
    scale:   the attachment's scale when it was saved
    tensors: module name + "." + tensor name -> trained tensor
    """

    spec: Spec
    modules: Mapping[str, tuple[int, int]]
    scale: float
    tensors: Mapping[str, Tensor]

    def __str__(self) -> str:
        count = sum(tensor.numel() for tensor in self.tensors.values())
        return f"{self.spec} on {len(self.modules)} modules, {count:,} parameters, scale {self.scale}"
