"""Which factors one linear layer gets, and how they start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..shapes import KronShape

Start = Literal["zero", "kaiming", "normal"]
"""Zero; Kaiming-uniform with a = √5, torch's default for a Linear; Normal with standard deviation 1/N1."""


@dataclass(frozen=True)
class Layout:
    """Factors of one layer: scale · (A ⊗ B), B = B_up · B_down and A = A_up · A_down where they have a rank.

    shape:    sizes of A and B, and R of B
    has_a:    False for LoRA, whose A is the 1×1 identity
    a_rank:   R of A where A itself is a product, else None
    scale:    what the spec multiplies the delta by, alpha / R included
    shuffled: output index n2·N1 + n1
    starts:   how each factor starts, by name; at least one of every product is zero, so the delta starts at 0
    dtype:    of the factors
    """

    shape: KronShape
    has_a: bool
    a_rank: int | None
    scale: float
    shuffled: bool
    starts: tuple[tuple[str, Start], ...]
    dtype: torch.dtype

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Name -> size of every trained factor, in the order in which they are registered and saved."""
        shape = self.shape
        sizes: dict[str, tuple[int, int]] = {}
        if self.has_a and self.a_rank is None:
            sizes["lokr_a"] = (shape.n1, shape.k1)
        elif self.has_a and self.a_rank is not None:
            sizes["lokr_a_up"] = (shape.n1, self.a_rank)
            sizes["lokr_a_down"] = (self.a_rank, shape.k1)
        if shape.rank is None:
            sizes["lokr_b"] = (shape.n2, shape.k2)
        else:
            sizes["lokr_b"] = (shape.n2, shape.rank)
            sizes["lokr_b_down"] = (shape.rank, shape.k2)
        return sizes

    @property
    def parameters(self) -> int:
        """Trained numbers of this layer."""
        return sum(rows * columns for rows, columns in self.sizes.values())

    def start(self, name: str, tensor: Tensor) -> None:
        """Fill one factor as the spec's `init` says."""
        how = dict(self.starts)[name]
        if how == "zero":
            nn.init.zeros_(tensor)
        elif how == "kaiming":
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        else:
            nn.init.normal_(tensor, mean=0.0, std=1.0 / self.shape.n1)

    def __str__(self) -> str:
        shape = self.shape
        right = f"({shape.n2}x{shape.k2})"
        if shape.rank is not None:
            right = f"({shape.n2}x{shape.rank})·({shape.rank}x{shape.k2})"
        if not self.has_a:
            return right
        left = f"({shape.n1}x{shape.k1})"
        if self.a_rank is not None:
            left = f"({shape.n1}x{self.a_rank})·({self.a_rank}x{shape.k1})"
        return f"{left} x {right}"
