"""Which tile sizes the Triton kernels run with: the row of the tuned table for this GPU and these sizes, else a rule.

A rule takes the shipped candidate of the least predicted time (`costs.py`); no GPU has measured one. Nothing is
searched at run time, and except for the linear kernel's tiles, which follow the GPU, a rule's choice depends on sizes
and dtype alone: the order of every sum, and so every bit of the result, is the same at each call and, without rows of
the table, on each machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .. import tuned
from ..costs import PEAKS, blocks, shared_limit
from ..kernel_costs import LinearSizes, linear_us
from ..launch import Architecture

SHARED_BYTES = {capability: peaks.shared_bytes for capability, peaks in PEAKS.items()}
"""Compute capability -> shared memory that one program may use."""
ACCUMULATORS, MIX_ACCUMULATORS, UNALIGNED_ACCUMULATORS, GATHER_ACCUMULATORS = 128, 64, 32, 16
"""Most accumulators a thread, beyond which registers spill: alone; beside as many elements of T; where these come
one by one; where every element of an operand has an address of its own."""
MINIMUM = 16
"""Least size of a dot operand's dimension."""


def power_of_two(size: int, *, at_most: int) -> int:
    """The least power of two from MINIMUM up that holds `size`, but at most `at_most`."""
    return min(at_most, max(MINIMUM, 1 << max(0, size - 1).bit_length()))


def resources(
    architecture: Architecture, shared_bytes: int, accumulators: int, most: int = ACCUMULATORS
) -> list[str]:
    """Why a program cannot have so much shared memory and so many accumulators a thread; empty where it can."""
    found, limit = [], shared_limit(architecture.capability)
    if shared_bytes > limit:
        found.append(f"{shared_bytes} bytes of shared memory, sm_{architecture.capability} has {limit}")
    if accumulators > most:
        found.append(f"{accumulators} accumulators a thread, more than {most} spill")
    return found


@dataclass(frozen=True)
class LinearConfig:
    """The GEMM with tails: its tile, the K-step of its tails, warps, stages, whether operands come by descriptor."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int
    warps: int
    stages: int
    descriptors: bool = False

    def reasons(self, architecture: Architecture, dtype: torch.dtype) -> list[str]:
        """Why this configuration cannot run `dtype` on the architecture; empty where it can."""
        shared_bytes = self.stages * self.block_k * (self.block_m + self.block_n) * dtype.itemsize
        found = resources(architecture, shared_bytes, self.block_m * self.block_n // (32 * self.warps))
        if self.descriptors and architecture.capability < 90:
            found.append(f"descriptors need sm_90, got sm_{architecture.capability}")
        return found


@dataclass(frozen=True)
class Tile:
    """A tile of the linear kernel."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


DESCRIPTOR_TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 64, 64, 8, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 64, 64, 8, 4),
    Tile(32, 64, 64, 4, 4),
    Tile(16, 64, 64, 4, 4),
)
"""16-bit operands by descriptors, where a program may use 160 KB of shared memory or more."""
POINTER_TILES = (
    Tile(128, 128, 64, 8, 4),
    Tile(64, 128, 64, 8, 4),
    Tile(128, 64, 64, 8, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 64, 64, 8, 4),
    Tile(32, 64, 64, 4, 4),
    Tile(16, 64, 64, 4, 4),
)
"""16-bit operands by pointers, likewise."""
NARROW_TILES = (
    Tile(128, 128, 32, 8, 4),
    Tile(64, 128, 32, 8, 4),
    Tile(128, 64, 32, 8, 4),
    Tile(64, 64, 64, 4, 3),
    Tile(64, 64, 64, 8, 3),
    Tile(32, 64, 64, 4, 3),
    Tile(16, 64, 64, 4, 3),
)
"""16-bit operands on the other architectures."""
SINGLE_TILES = (
    Tile(64, 64, 32, 8, 2),
    Tile(32, 64, 32, 8, 2),
    Tile(16, 64, 32, 8, 2),
)
"""fp32 operands."""


GROUP_M = 8
"""Rows of tiles before the next column, so that neighbours share W in cache."""


def tiles_of(
    architecture: Architecture, dtype: torch.dtype, descriptors: bool, accumulators: int = ACCUMULATORS
) -> list[Tile]:
    """Tiles shipped for the architecture and these operands, with at most so many accumulators a thread."""
    if dtype == torch.float32:
        tiles = SINGLE_TILES
    elif shared_limit(architecture.capability) < 160 * 1024:
        tiles = NARROW_TILES
    else:
        tiles = DESCRIPTOR_TILES if descriptors else POINTER_TILES
    return [tile for tile in tiles if tile.block_m * tile.block_n <= 32 * tile.warps * accumulators]


def linear_choice(
    architecture: Architecture,
    dtype: torch.dtype,
    tokens: int,
    features: int,
    in_features: int,
    transposed: bool,
    tail_width: int,
    accumulators: int,
    descriptors: bool,
) -> LinearConfig:
    """The configuration for a GEMM with tails.

    in_features:  K, 0 without W
    transposed:   whether W's rows are not contiguous
    tail_width:   columns of the widest T with a dot, 0 without
    accumulators: most that a thread may have beside its tail's addresses and elements
    """
    sizes = (dtype, tokens, features, in_features, transposed, tail_width, accumulators, descriptors)
    return tuned.choose(
        "linear", LinearConfig, architecture, sizes, lambda: linear_config(architecture, *sizes)
    )


@lru_cache(maxsize=4096)
def linear_config(
    architecture: Architecture,
    dtype: torch.dtype,
    tokens: int,
    features: int,
    in_features: int,
    transposed: bool,
    tail_width: int,
    accumulators: int,
    descriptors: bool,
) -> LinearConfig:
    """The shipped tile of the least predicted time; arguments as in `linear_choice`."""
    sizes = LinearSizes(tokens, features, in_features, tail_width)
    return min(
        linear_candidates(architecture, dtype, tail_width, accumulators, descriptors),
        key=lambda config: linear_us(architecture, dtype, sizes, config),
    )


def linear_candidates(
    architecture: Architecture, dtype: torch.dtype, tail_width: int, accumulators: int, descriptors: bool
) -> list[LinearConfig]:
    """Every tile that the architecture ships for these operands, the largest first."""
    return [
        LinearConfig(
            tile.block_m,
            tile.block_n,
            tile.block_k,
            tail_block(tail_width, tile.block_k),
            GROUP_M,
            tile.warps,
            tile.stages,
            descriptors,
        )
        for tile in tiles_of(architecture, dtype, descriptors, accumulators)
    ]


def tail_block(width: int, block_k: int) -> int:
    """K-step of a tail: the largest that pads no more than a tenth beyond the tensor cores' own step, MINIMUM."""
    width = max(width, 1)
    least = blocks(width, MINIMUM) * MINIMUM
    fitting = (step for step in (block_k, 32) if 10 * blocks(width, step) * step <= 11 * least)
    return min(block_k, next(fitting, MINIMUM))


def block_tail_pays(width: int, first: int, second: int, right: int, block_n: int = 128) -> bool:
    """Whether an I ⊗ B tail costs no more K-steps than the dense L.

    width = first · second: columns of T, in `first` groups; right: features of one group
    """
    groups = min(first, 1 if right % block_n == 0 else 1 + blocks(block_n, right))
    step = MINIMUM if second <= MINIMUM else 32
    return groups * blocks(second, step) * step <= blocks(width, 32) * 32


def elementwise_tail_pays(first: int, second: int, right: int, block_n: int = 128) -> bool:
    """Whether an I ⊗ B tail is cheaper as multiply-adds per element: where a tile crosses many small groups."""
    groups = min(first, 1 + block_n // right)
    return groups * max(second, MINIMUM) >= 32 * second
