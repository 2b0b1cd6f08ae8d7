"""Which tile sizes the Triton kernels run with.

Every configuration here was chosen by rule; no GPU has measured it. Nothing is searched at run time, and except
for the linear kernel's tiles, which follow the number of multiprocessors, a choice depends on sizes and dtype
alone: the order of every sum, and so every bit of the result, is the same at each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..launch import Architecture

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Compute capability -> shared memory that one program may use."""
ACCUMULATORS, MIX_ACCUMULATORS, UNALIGNED_ACCUMULATORS, GATHER_ACCUMULATORS = 128, 64, 32, 16
"""Most accumulators a thread, beyond which registers spill: alone; beside as many elements of T; where these come
one by one; where every element of an operand has an address of its own."""
MINIMUM = 16
"""Least size of a dot operand's dimension."""


def shared_limit(capability: int) -> int:
    """Shared memory that one program may use on sm_`capability`; an unknown one counts as the next lower known."""
    known = [each for each in SHARED_BYTES if each <= capability]
    return SHARED_BYTES[max(known)] if known else min(SHARED_BYTES.values())


def power_of_two(size: int, *, at_most: int) -> int:
    """The least power of two from MINIMUM up that holds `size`, but at most `at_most`."""
    return min(at_most, max(MINIMUM, 1 << max(0, size - 1).bit_length()))


def blocks(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


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
        found = []
        shared = self.stages * self.block_k * (self.block_m + self.block_n) * dtype.itemsize
        limit = shared_limit(architecture.capability)
        if shared > limit:
            found.append(f"{shared} bytes of shared memory, sm_{architecture.capability} has {limit}")
        if self.descriptors and architecture.capability < 90:
            found.append(f"descriptors need sm_90, got sm_{architecture.capability}")
        accumulators = self.block_m * self.block_n // (32 * self.warps)
        if accumulators > ACCUMULATORS:
            found.append(f"{accumulators} accumulators a thread, more than {ACCUMULATORS} spill")
        return found


@dataclass(frozen=True)
class Tile:
    """A tile of the linear kernel and its speed relative to the largest where all multiprocessors are busy."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    speed: float


DESCRIPTOR_TILES = (
    Tile(128, 256, 64, 8, 3, 1.0),
    Tile(128, 128, 64, 8, 4, 0.9),
    Tile(64, 128, 64, 4, 4, 0.75),
    Tile(128, 64, 64, 8, 4, 0.7),
    Tile(64, 64, 64, 4, 4, 0.6),
    Tile(64, 64, 64, 8, 4, 0.55),
    Tile(32, 64, 64, 4, 4, 0.35),
    Tile(16, 64, 64, 4, 4, 0.2),
)
"""16-bit operands by descriptors, where a program may use 160 KB of shared memory or more."""
POINTER_TILES = (
    Tile(128, 128, 64, 8, 4, 1.0),
    Tile(64, 128, 64, 8, 4, 0.85),
    Tile(128, 64, 64, 8, 4, 0.8),
    Tile(64, 64, 64, 4, 4, 0.7),
    Tile(64, 64, 64, 8, 4, 0.65),
    Tile(32, 64, 64, 4, 4, 0.4),
    Tile(16, 64, 64, 4, 4, 0.2),
)
"""16-bit operands by pointers, likewise."""
NARROW_TILES = (
    Tile(128, 128, 32, 8, 4, 1.0),
    Tile(64, 128, 32, 8, 4, 0.85),
    Tile(128, 64, 32, 8, 4, 0.8),
    Tile(64, 64, 64, 4, 3, 0.7),
    Tile(64, 64, 64, 8, 3, 0.65),
    Tile(32, 64, 64, 4, 3, 0.4),
    Tile(16, 64, 64, 4, 3, 0.2),
)
"""16-bit operands on the other architectures."""
SINGLE_TILES = (
    Tile(64, 64, 32, 8, 2, 1.0),
    Tile(32, 64, 32, 8, 2, 0.6),
    Tile(16, 64, 32, 8, 2, 0.3),
)
"""fp32 operands."""


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


@lru_cache(maxsize=4096)
def linear_config(
    architecture: Architecture,
    dtype: torch.dtype,
    tokens: int,
    features: int,
    tail_width: int,
    accumulators: int,
    descriptors: bool,
) -> LinearConfig:
    """The tile that keeps the most of the machine busy, by waves of programs over its multiprocessors.

    tail_width:   columns of the widest T with a dot, 0 without
    accumulators: most that a thread may have beside its tail's addresses and elements
    """

    def rate(tile: Tile) -> float:
        programs = blocks(tokens, tile.block_m) * blocks(features, tile.block_n)
        waves = blocks(programs, architecture.multiprocessors)
        return (
            tile.speed
            * tokens
            * features
            / (waves * architecture.multiprocessors * tile.block_m * tile.block_n)
        )

    tile = max(tiles_of(architecture, dtype, descriptors, accumulators), key=rate)
    return LinearConfig(
        tile.block_m,
        tile.block_n,
        tile.block_k,
        tail_block(tail_width, tile.block_k),
        8,
        tile.warps,
        tile.stages,
        descriptors,
    )


def tail_block(width: int, block_k: int) -> int:
    """K-step of a tail: small enough not to pad its width by half, never above the main loop's."""
    if width <= MINIMUM:
        return MINIMUM
    return 32 if width <= 32 or width % 64 else block_k


@dataclass(frozen=True)
class ShrinkConfig:
    """The down map: rows, columns and K-step of a tile, and how many programs share the K of one tile."""

    block_m: int
    block_w: int
    block_k: int
    split: int
    k_per_split: int
    warps: int
    stages: int


@lru_cache(maxsize=4096)
def shrink_config(dtype: torch.dtype, rows: int, width: int, features: int) -> ShrinkConfig:
    """Tiles as wide as T, so that x is read once; K is split where rows alone give too few programs."""
    single = dtype == torch.float32
    block_w = power_of_two(width, at_most=64 if single else 128)
    block_m = power_of_two(rows, at_most=32 if single or rows < 4096 else 64)
    block_k = power_of_two(features, at_most=32 if single else 64)
    programs = blocks(rows, block_m) * blocks(width, block_w)
    split = max(1, min(features // 256, 128 // programs, 8))
    steps = blocks(blocks(features, block_k), split)
    split = blocks(features, steps * block_k)
    return ShrinkConfig(block_m, block_w, block_k, split, steps * block_k, 4, 3)


@dataclass(frozen=True)
class MixConfig:
    """A P: columns (tokens times inner columns), rows and K-step of a tile."""

    block_j: int
    block_o: int
    block_i: int
    warps: int
    stages: int


@lru_cache(maxsize=4096)
def mix_config(dtype: torch.dtype, out: int, features: int) -> MixConfig:
    """A whole column of A P where O1 allows, so that P is read once; the smaller A, the more columns at a time."""
    most, tile = (32, 2048) if dtype == torch.float32 else (64, 4096)
    block_o, block_i = (power_of_two(size, at_most=most) for size in (out, features))
    block_j = tile // max(block_o, block_i)
    return MixConfig(block_j, block_o, block_i, 4 if block_j < 128 else 8, 2)


@dataclass(frozen=True)
class ReduceConfig:
    """Factor gradients: rows of a step, the tile of the result, and how many programs share its rows."""

    block_r: int
    block_p: int
    block_q: int
    split: int
    warps: int
    stages: int


REDUCE_PROGRAMS, PARTIAL_BYTES = 512, 2 << 20
"""A reduction is split into so many programs where it has the rows, with partial sums of at most so many bytes."""


@lru_cache(maxsize=4096)
def reduce_config(dtype: torch.dtype, rows: int, height: int, width: int) -> ReduceConfig:
    """Splits the rows by sizes alone, so that the sum has one order on every machine."""
    single = dtype == torch.float32
    block_p, block_q = (power_of_two(size, at_most=32 if single else 64) for size in (height, width))
    # The largest power of two whose rows of both operands are 16 KB or less, and whose addresses fit in registers.
    block_r = min(128, 1 << ((8192 // (block_p + block_q)).bit_length() - 1)) // (2 if single else 1)
    tiles = blocks(height, block_p) * blocks(width, block_q)
    fitting = PARTIAL_BYTES // (4 * height * width)
    split = max(1, min(REDUCE_PROGRAMS // tiles, fitting, rows // (4 * block_r)))
    warps = 8 if block_p * block_q == 64 * 64 else 4
    return ReduceConfig(block_r, block_p, block_q, split, warps, 2 if single else 3)


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
