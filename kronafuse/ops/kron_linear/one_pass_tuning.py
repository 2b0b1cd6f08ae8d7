"""Configurations of the one-pass form of a fat term: a measured row, else the least predicted time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .. import tuned
from ..costs import blocks
from ..kernel_costs import OnePassSizes, one_pass_us
from ..launch import Architecture
from .tuning import GROUP_M, Tile, resources

ONE_PASS_SUMS, ONE_PASS_SUMS_IN_LINE = 96, 80
"""Most sums a thread, of the result and of A X, beside x's tile: where products read shared memory themselves (wgmma,
tcgen05) and copies need no addresses, and where operands or addresses take registers. More spill."""


@dataclass(frozen=True)
class OnePassConfig:
    """The one-pass form: its tile, the left groups that a tile may touch and the span that it may not cross.

    block_k: K-step inside one i1
    groups:  1 or 2, each with block_m · block_k sums beside the accumulators
    span:    features after which a tile ends: O2 or 2·O2, or N where tiles cross from one group into the next
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int
    groups: int
    span: int
    descriptors: bool = False

    def programs(self, tokens: int, features: int) -> int:
        """Tiles of y."""
        return blocks(tokens, self.block_m) * blocks(self.span, self.block_n) * (features // self.span)

    def reasons(self, architecture: Architecture, dtype: torch.dtype, left: int, right: int) -> list[str]:
        """Why this configuration cannot run `dtype` on the architecture with O1 = left, O2 = right."""
        shared_bytes = self.stages * self.block_k * (self.block_m + self.block_n) * dtype.itemsize
        sums = (self.block_m * self.block_n + self.groups * self.block_m * self.block_k) // (32 * self.warps)
        asynchronous = self.descriptors and architecture.capability in (90, 100)
        found = resources(
            architecture, shared_bytes, sums, ONE_PASS_SUMS if asynchronous else ONE_PASS_SUMS_IN_LINE
        )
        if self.descriptors and architecture.capability < 90:
            found.append(f"descriptors need sm_90, got sm_{architecture.capability}")
        if (left * right) % self.span:
            found.append(f"span {self.span} does not divide N = {left}·{right}")
        elif self.touched(right) > self.groups:
            found.append(f"a tile touches {self.touched(right)} groups of {right}, more than {self.groups}")
        return found

    def touched(self, right: int) -> int:
        """Most groups of `right` features that one tile touches."""
        if self.span == right:
            return 1
        if self.block_n >= self.span:
            return blocks(self.span, right)
        return 1 + blocks(self.block_n - 1, right)


ONE_PASS_DESCRIPTOR_TILES = (
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 32, 8, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 128, 32, 4, 4),
    Tile(128, 64, 64, 8, 4),
    Tile(128, 64, 32, 8, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 64, 32, 4, 4),
    Tile(64, 64, 16, 4, 4),
    Tile(32, 64, 64, 4, 4),
    Tile(16, 64, 64, 4, 4),
)
"""The one-pass form, 16-bit operands by descriptors."""
ONE_PASS_POINTER_TILES = (
    Tile(128, 128, 32, 8, 4),
    Tile(64, 128, 32, 8, 4),
    Tile(128, 64, 32, 8, 4),
    Tile(64, 64, 64, 8, 3),
    Tile(64, 64, 32, 8, 4),
    Tile(64, 64, 16, 8, 4),
    Tile(32, 64, 32, 4, 4),
    Tile(16, 64, 32, 4, 4),
)
"""16-bit operands by pointers, likewise."""
ONE_PASS_SINGLE_TILES = (
    Tile(64, 64, 32, 8, 2),
    Tile(64, 64, 16, 8, 2),
    Tile(32, 64, 32, 8, 2),
    Tile(16, 64, 32, 8, 2),
)
"""fp32 operands, likewise."""


def one_pass_tiles_of(dtype: torch.dtype, descriptors: bool) -> tuple[Tile, ...]:
    """Tiles of the one-pass form for these operands."""
    if dtype == torch.float32:
        return ONE_PASS_SINGLE_TILES
    return ONE_PASS_DESCRIPTOR_TILES if descriptors else ONE_PASS_POINTER_TILES


def one_pass_candidates(
    architecture: Architecture, dtype: torch.dtype, left: int, right: int, descriptors: bool
) -> list[OnePassConfig]:
    """Every valid configuration for O1 = left, O2 = right, the largest tiles first."""
    found = []
    for tile in one_pass_tiles_of(dtype, descriptors):
        for groups, span in dict.fromkeys(((1, right), (2, 2 * right), (2, left * right))):
            config = OnePassConfig(
                tile.block_m,
                tile.block_n,
                tile.block_k,
                GROUP_M,
                tile.warps,
                tile.stages,
                groups,
                span,
                descriptors,
            )
            if not config.reasons(architecture, dtype, left, right):
                found.append(config)
    return found


def one_pass_choice(
    architecture: Architecture,
    dtype: torch.dtype,
    tokens: int,
    left: tuple[int, int],
    right: tuple[int, int],
    has_weight: bool,
    transposed: bool,
    descriptors: bool,
) -> OnePassConfig:
    """The configuration for A (O1, I1) = left and B (O2, I2) = right; transposed: whether W's rows have gaps."""
    return tuned.choose(
        "one_pass",
        OnePassConfig,
        architecture,
        (dtype, tokens, *left, *right, has_weight, transposed, descriptors),
        lambda: one_pass_config(architecture, dtype, tokens, left, right, has_weight, descriptors),
        (architecture, dtype, left[0], right[0]),
    )


@lru_cache(maxsize=4096)
def one_pass_config(
    architecture: Architecture,
    dtype: torch.dtype,
    tokens: int,
    left: tuple[int, int],
    right: tuple[int, int],
    has_weight: bool,
    descriptors: bool,
) -> OnePassConfig:
    """The valid configuration of the least predicted time; arguments as in `one_pass_choice`, W in either layout."""
    sizes = OnePassSizes(tokens, left, right, has_weight)
    return min(
        one_pass_candidates(architecture, dtype, left[0], right[0], descriptors),
        key=lambda config: one_pass_us(architecture, dtype, sizes, config),
    )
