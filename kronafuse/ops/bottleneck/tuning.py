"""Which tile sizes the Triton kernels run with.

Every configuration here was chosen by rule; no GPU has measured it. A choice depends on sizes, dtypes and the shared
memory of a program, so the order of every sum, and so every bit of the result, is the same at each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..kron_linear.tuning import MINIMUM, blocks, power_of_two, shared_limit
from ..launch import Architecture

PROGRAMS = 128
"""Programs that a launch should have where there is work for so many."""
WIDE = 192
"""Hidden widths above it take narrower tiles of the features."""
MOST_SPLITS = 8
"""Programs that may share the columns of one block of rows; each of them computes its hidden layer."""


def width_parts(width: int) -> tuple[int, int]:
    """H as one power of two, or as two where that pads less: (first, second or 0)."""
    whole = power_of_two(width, at_most=256)
    first = whole // 2
    second = power_of_two(width - first, at_most=256) if width > first else 0
    return (first, second) if whole > MINIMUM and 0 < first + second < whole else (whole, 0)


@dataclass(frozen=True)
class BottleneckConfig:
    """Rows of a program, features of a step of the first product and of the second, the hidden width in two parts,
    how many programs share the rows' columns and how many columns each has, warps and stages."""

    block_m: int
    block_in: int
    block_out: int
    width: int
    second: int
    split: int
    columns: int
    warps: int
    stages: int


@lru_cache(maxsize=4096)
def bottleneck_config(
    architecture: Architecture,
    dtype: torch.dtype,
    widest: torch.dtype,
    tokens: int,
    in_features: int,
    width: int,
    out_features: int,
) -> BottleneckConfig:
    """The largest blocks of rows that still give `PROGRAMS` programs, then columns shared.

    dtype:  of the products
    widest: of the features that are read and written
    """
    single = dtype == torch.float32
    first, second = width_parts(width)
    block_m = power_of_two(tokens // PROGRAMS, at_most=32 if single else 64)
    # The widest hidden layers leave few registers for the tiles beside them.
    step, stages = 32 if single or first + second > WIDE else 64, 3

    def shared() -> int:
        """The stages' tiles of the features and of the factor, and the hidden layer."""
        rows = step * (block_m * widest.itemsize + (first + second) * dtype.itemsize)
        return stages * rows + block_m * (first + second) * dtype.itemsize

    limit = shared_limit(architecture.capability)
    if shared() > limit:
        stages = 2
    while shared() > limit and step > MINIMUM:
        step //= 2
    block_in, block_out = (power_of_two(size, at_most=step) for size in (in_features, out_features))
    split = max(1, min(PROGRAMS // max(1, blocks(tokens, block_m)), MOST_SPLITS))
    columns = blocks(blocks(out_features, block_out), split) * block_out
    split = blocks(out_features, columns)
    warps = 8 if block_m * (first + second) > 64 * 64 else 4
    return BottleneckConfig(block_m, block_in, block_out, first, second, split, columns, warps, stages)
