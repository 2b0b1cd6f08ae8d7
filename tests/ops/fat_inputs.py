"""What the tests of the linear side share: random tensors and fat maps on the device under test."""

from __future__ import annotations

from typing import Any

import torch
from kronafuse.ops.kron_linear.maps import KronMap
from kronafuse.testing.inputs import generator, random
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOKENS = 19


class Inputs:
    """Random tensors of one dtype from one seed, on the device under test."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.source = dtype, generator(0)

    def __call__(self, *shape: int, strided: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        return random(self.source, *shape, dtype=dtype or self.dtype, strided=strided).to(DEVICE)

    def fat(
        self, left: tuple[int, int], right: tuple[int, int], *, scaled: bool = False, **options: Any
    ) -> KronMap:
        """A fat map A (O1, I1) ⊗ B (O2, I2); scaled: with a scale per feature on either side."""
        if scaled:
            options["in_scale"] = self(left[1] * right[1], strided=True, dtype=torch.float32)
            options["out_scale"] = self(left[0] * right[0], strided=True, dtype=torch.float32)
        return KronMap(
            self(*left), self(*right), None, options.pop("scale", 0.7), "a_first", False, **options
        )
