"""Which tile sizes the Triton kernels run with: the row of the tuned table for this GPU and these sizes, else a rule.

The rule takes the candidate of the least predicted time (`costs.py`) on the GPU at hand; no GPU has measured one.
What it chooses puts rows and columns on programs and cuts sums into steps that follow one another: the same at each
call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch

from .. import tuned
from ..costs import blocks, shared_limit
from ..kernel_costs import BottleneckSizes, bottleneck_us
from ..kron_linear.reduction_tuning import FACTOR_BYTES
from ..kron_linear.tuning import MINIMUM, power_of_two, resources
from ..launch import Architecture

PROGRAMS = 128
"""Columns are shared only up to so many programs."""
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

    def reasons(self, architecture: Architecture, dtype: torch.dtype, widest: torch.dtype) -> list[str]:
        """Why this configuration cannot run `dtype` on features of `widest` there; empty where it can."""
        accumulators = self.block_m * (self.width + self.second) // (32 * self.warps)
        return resources(architecture, self.shared_bytes(dtype, widest), accumulators)

    def shared_bytes(self, dtype: torch.dtype, widest: torch.dtype) -> int:
        """The stages' tiles of the features and of the factor, and the hidden layer."""
        hidden = self.width + self.second
        step = max(self.block_in, self.block_out)
        rows = step * (self.block_m * widest.itemsize + hidden * FACTOR_BYTES)
        return self.stages * rows + self.block_m * hidden * dtype.itemsize


def bottleneck_choice(
    architecture: Architecture,
    dtype: torch.dtype,
    widest: torch.dtype,
    tokens: int,
    in_features: int,
    width: int,
    out_features: int,
) -> BottleneckConfig:
    """The configuration for a pass through the hidden layer.

    dtype:  of the products
    widest: of the features that are read and written
    """
    sizes = (dtype, widest, tokens, in_features, width, out_features)
    return tuned.choose(
        "bottleneck",
        BottleneckConfig,
        architecture,
        sizes,
        lambda: bottleneck_config(architecture, *sizes),
        (architecture, dtype, widest),
    )


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
    """The candidate of the least predicted time; arguments as in `bottleneck_choice`."""
    sizes = BottleneckSizes(tokens, in_features, width, out_features)
    return min(
        bottleneck_candidates(architecture, dtype, widest, tokens, in_features, width, out_features),
        key=lambda config: bottleneck_us(architecture, dtype, widest, sizes, config),
    )


def bottleneck_candidates(
    architecture: Architecture,
    dtype: torch.dtype,
    widest: torch.dtype,
    tokens: int,
    in_features: int,
    width: int,
    out_features: int,
) -> Iterator[BottleneckConfig]:
    """Blocks of rows that the tokens fill, the largest first, with each number of programs that may share columns."""
    single = dtype == torch.float32
    first, second = width_parts(width)
    heights = dict.fromkeys(
        power_of_two(tokens, at_most=most) for most in ((32, 16) if single else (64, 32, 16))
    )
    for block_m, share in product(heights, (1, 2, 4, MOST_SPLITS)):
        # The widest hidden layers leave few registers for the tiles beside them, the fewest where features are wider.
        step, stages = 32 if single or first + second > WIDE else 64, 3
        if first + second > WIDE and widest.itemsize > dtype.itemsize:
            step = MINIMUM
        warps = 8 if block_m * (first + second) >= 64 * 64 else 4
        limit = shared_limit(architecture.capability)

        def config(step: int, stages: int, block_m: int = block_m, share: int = share, warps: int = warps):
            block_in, block_out = (power_of_two(size, at_most=step) for size in (in_features, out_features))
            columns = blocks(blocks(out_features, block_out), share) * block_out
            split = blocks(out_features, columns)
            return BottleneckConfig(
                block_m, block_in, block_out, first, second, split, columns, warps, stages
            )

        if config(step, stages).shared_bytes(dtype, widest) > limit:
            stages = 2
        while config(step, stages).shared_bytes(dtype, widest) > limit and step > MINIMUM:
            step //= 2
        found = config(step, stages)
        if found.split == share and (share == 1 or blocks(tokens, block_m) * share <= PROGRAMS):
            yield found
