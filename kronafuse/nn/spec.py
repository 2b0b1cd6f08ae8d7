"""What the record of every adapter can do, whichever family it is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class TensorLayout(Protocol):
    """Trained tensors of one adapter in one place."""

    @property
    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> size, in the order in which they are registered and saved."""
        ...

    @property
    def parameters(self) -> int:
        """Trained numbers in this place."""
        ...

    @property
    def scale(self) -> float:
        """What multiplies the delta."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""
        ...

    def start(self, name: str, tensor: Tensor) -> None:
        """Fill one tensor as the record's `init` says."""
        ...


class Spec(ABC):
    """An adapter as a frozen record: `layout` says which tensors it has where."""

    @abstractmethod
    def at(self, name: str) -> Spec:
        """The record that counts in the place of this name."""

    @abstractmethod
    def stored_as(self, dtype: torch.dtype) -> Spec:
        """The record of the same adapter with its tensors in this dtype, in every place."""

    @abstractmethod
    def layout(self, n: int, k: int, name: str = "") -> TensorLayout:
        """The tensors for a place that maps K numbers to N; `name` appears in errors."""
