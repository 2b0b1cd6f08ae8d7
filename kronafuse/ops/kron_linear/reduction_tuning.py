"""Configurations of the kernels that sum over features or tokens: shrink, mix, reduce, and shrink with a gradient.

As `tuning.py` says: a measured row, else the rule; a rule depends on sizes and dtype alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch

from .. import tuned
from ..costs import REFERENCE, blocks
from ..kernel_costs import reduce_us, shrink_us
from ..launch import Architecture
from .tuning import MINIMUM, SHARED_BYTES, power_of_two, resources

FACTOR_BYTES = 4
"""Of a factor's element: fp32, in which factors are trained beside 16-bit features. Narrower ones take less."""


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

    def reasons(self, architecture: Architecture, dtype: torch.dtype) -> list[str]:
        """Why this configuration cannot run `dtype` on the architecture; empty where it can."""
        shared_bytes = self.stages * self.block_k * self.line_bytes(dtype)
        return resources(architecture, shared_bytes, self.block_m * self.block_w // (32 * self.warps))

    def line_bytes(self, dtype: torch.dtype) -> int:
        """One k of a step's tiles of x and of the factors."""
        return self.block_m * dtype.itemsize + self.block_w * FACTOR_BYTES


def shrink_choice(
    architecture: Architecture, dtype: torch.dtype, rows: int, width: int, features: int
) -> ShrinkConfig:
    """The configuration for a down map of `rows` rows of `features` onto `width` columns."""
    sizes = (dtype, rows, width, features)
    return tuned.choose("shrink", ShrinkConfig, architecture, sizes, lambda: shrink_config(*sizes))


@lru_cache(maxsize=4096)
def shrink_config(dtype: torch.dtype, rows: int, width: int, features: int) -> ShrinkConfig:
    """The rows of a tile and the parts of K with the least predicted time; tiles as wide as T: x is read once."""
    candidates = shrink_candidates(dtype, rows, width, features)
    return min(
        (config for config in candidates if (config.warps, config.stages) == (4, 3)),
        key=lambda config: shrink_us(REFERENCE, dtype, rows, width, features, config),
    )


SPLITS = (1, 2, 4, 8)
"""Programs that may share the K of one tile."""


def shrink_candidates(dtype: torch.dtype, rows: int, width: int, features: int) -> Iterator[ShrinkConfig]:
    """Tiles that fit every architecture, the largest first, none with more rows or columns than the problem pads to."""
    single = dtype == torch.float32
    block_w = power_of_two(width, at_most=64 if single else 128)
    heights = dict.fromkeys(
        power_of_two(rows, at_most=most) for most in ((32, 16) if single else (64, 32, 16))
    )
    block_k, limit = power_of_two(features, at_most=32 if single else 64), min(SHARED_BYTES.values())
    # Wide fp32 factors: three stages of half the step hold as much as there is.
    while 3 * block_k * (max(heights) * dtype.itemsize + block_w * FACTOR_BYTES) > limit:
        block_k //= 2
    for block_m, split, (warps, stages) in product(heights, SPLITS, ((4, 3), (4, 4), (8, 3), (4, 2))):
        k_per_split = blocks(blocks(features, block_k), split) * block_k
        config = ShrinkConfig(block_m, block_w, block_k, split, k_per_split, warps, stages)
        fits = stages * block_k * config.line_bytes(dtype) <= limit
        if fits and blocks(features, k_per_split) == split:
            yield config


@dataclass(frozen=True)
class MixConfig:
    """A P: columns (tokens times inner columns), rows and K-step of a tile."""

    block_j: int
    block_o: int
    block_i: int
    warps: int
    stages: int

    def reasons(self, architecture: Architecture, dtype: torch.dtype) -> list[str]:
        """Why this configuration cannot run `dtype` on the architecture; empty where it can."""
        line_bytes = self.block_o * FACTOR_BYTES + self.block_j * dtype.itemsize
        shared_bytes = self.stages * self.block_i * line_bytes
        return resources(architecture, shared_bytes, self.block_o * self.block_j // (32 * self.warps))


def mix_choice(
    architecture: Architecture, dtype: torch.dtype, elements: int, out: int, features: int
) -> MixConfig:
    """The configuration for A (out, features) on `elements` columns, tokens times inner columns."""
    return tuned.choose(
        "mix",
        MixConfig,
        architecture,
        (dtype, elements, out, features),
        lambda: mix_config(dtype, out, features),
    )


@lru_cache(maxsize=4096)
def mix_config(dtype: torch.dtype, out: int, features: int) -> MixConfig:
    """A whole column of A P where O1 allows, so that P is read once; the smaller A, the more columns at a time.

    Its predicted time is the memory's whatever the tile: there is nothing for the prediction to choose.
    """
    return next(mix_candidates(dtype, out, features))


def mix_candidates(dtype: torch.dtype, out: int, features: int) -> Iterator[MixConfig]:
    """The rule's tile, then half and a quarter of its columns, then other warps and stages."""
    most, tile = (32, 2048) if dtype == torch.float32 else (64, 4096)
    block_o, block_i = (power_of_two(size, at_most=most) for size in (out, features))
    block_j = tile // max(block_o, block_i)
    for divisor, stages in product((1, 2, 4), (2, 3)):
        columns = block_j // divisor
        if columns >= MINIMUM:
            warps = 4 if columns < 128 else 8
            yield MixConfig(columns, block_o, block_i, warps, stages)


@dataclass(frozen=True)
class ReduceConfig:
    """Factor gradients: rows of a step, the tile of the result, and how many programs share its rows."""

    block_r: int
    block_p: int
    block_q: int
    split: int
    warps: int
    stages: int

    def reasons(self, architecture: Architecture, dtype: torch.dtype) -> list[str]:
        """Why this configuration cannot run `dtype` on the architecture; empty where it can."""
        shared_bytes = self.stages * self.block_r * (self.block_p + self.block_q) * dtype.itemsize
        return resources(architecture, shared_bytes, self.block_p * self.block_q // (32 * self.warps))


REDUCE_PROGRAMS, PARTIAL_BYTES = 512, 2 << 20
"""A reduction is split into so many programs at most, with partial sums of at most so many bytes."""


def reduce_choice(
    architecture: Architecture, dtype: torch.dtype, rows: int, height: int, width: int
) -> ReduceConfig:
    """The configuration for a gradient (height, width) summed over `rows` rows."""
    sizes = (dtype, rows, height, width)
    return tuned.choose("reduce", ReduceConfig, architecture, sizes, lambda: reduce_config(*sizes))


@lru_cache(maxsize=4096)
def reduce_config(dtype: torch.dtype, rows: int, height: int, width: int) -> ReduceConfig:
    """The split of the rows with the least predicted time, by sizes alone: the sum has one order on every machine."""
    usual = 2 if dtype == torch.float32 else 3
    return min(
        (config for config in reduce_candidates(dtype, rows, height, width) if config.stages == usual),
        key=lambda config: reduce_us(REFERENCE, dtype, rows, height, width, config),
    )


def reduce_candidates(dtype: torch.dtype, rows: int, height: int, width: int) -> Iterator[ReduceConfig]:
    """Splits by powers of two up to the limits, each with as many rows a step as its operands' addresses allow."""
    single = dtype == torch.float32
    block_p, block_q = (power_of_two(size, at_most=32 if single else 64) for size in (height, width))
    # The largest power of two whose rows of both operands are 16 KB or less, and whose addresses fit in registers.
    block_r = min(128, 1 << ((8192 // (block_p + block_q)).bit_length() - 1)) // (2 if single else 1)
    tiles = blocks(height, block_p) * blocks(width, block_q)
    fitting = PARTIAL_BYTES // (4 * height * width)
    most = max(1, min(REDUCE_PROGRAMS // tiles, fitting, rows // (2 * block_r)))
    warps = 8 if block_p * block_q == 64 * 64 else 4
    for exponent, stages in product(range(most.bit_length()), (2,) if single else (3, 2)):
        yield ReduceConfig(block_r, block_p, block_q, 1 << exponent, warps, stages)


@dataclass(frozen=True)
class ShrinkReduceConfig:
    """The down map and the gradient of its factor in one read: rows of a step, all features in one power of two or
    in two (block_l is the second, or 0), columns of the factor, and how many programs share the rows."""

    block_r: int
    block_f: int
    block_l: int
    block_o: int
    split: int
    warps: int
    stages: int

    @property
    def held(self) -> int:
        """Features of a row as a program holds them."""
        return self.block_f + self.block_l

    def reasons(self, dtype: torch.dtype, rows: int, features: int, width: int) -> list[str]:
        """Why one launch for both is not worth it or cannot be: the same on every architecture; empty where it can."""
        found = []
        accumulators = self.held * self.block_o // (32 * self.warps)
        most = SHRINK_REDUCE_ACCUMULATORS // (2 if dtype == torch.float32 else 1)
        if accumulators > most:
            found.append(f"{accumulators} accumulators a thread, more than {most} leave no room for x")
        tile = self.block_r * (self.held + self.block_o) + self.held * self.block_o
        shared, limit = self.stages * tile * dtype.itemsize, min(SHARED_BYTES.values())
        if shared > limit:
            found.append(f"{shared} bytes of shared memory, more than {limit}")
        columns = blocks(width, self.block_o)
        if columns > MOST_READS:
            found.append(
                f"{columns} blocks of {width} columns, which read x as often: more than {MOST_READS}"
            )
        busy = min(SHRINK_REDUCE_PROGRAMS // 6, columns * blocks(rows, self.block_r))
        if columns * self.split < busy:
            found.append(
                f"{columns * self.split} programs of {4 * features * width} bytes, fewer than {busy}"
            )
        return found


SHRINK_REDUCE_ACCUMULATORS, SHRINK_REDUCE_PROGRAMS, MOST_READS = 64, 256, 2
"""Most accumulators a thread in 16 bits, half of it in fp32; programs that a launch is split into; blocks of columns
that each read x, the second from cache."""


def _two_powers(size: int) -> tuple[int, int]:
    """`size` as one power of two, or as two where that pads less: (first, second or 0)."""
    whole = power_of_two(size, at_most=1 << 30)
    first = whole // 2
    second = power_of_two(size - first, at_most=first) if first >= MINIMUM and size > first else 0
    return (first, second) if 0 < second < first else (whole, 0)


def shrink_reduce_choice(
    architecture: Architecture, dtype: torch.dtype, rows: int, features: int, width: int
) -> ShrinkReduceConfig | None:
    """The configuration for a down map of `features` onto `width` columns with its factor's gradient; None: apart."""
    sizes = (dtype, rows, features, width)
    return tuned.choose(
        "shrink_reduce", ShrinkReduceConfig, architecture, sizes, lambda: shrink_reduce_config(*sizes), sizes
    )


@lru_cache(maxsize=4096)
def shrink_reduce_config(
    dtype: torch.dtype, rows: int, features: int, width: int
) -> ShrinkReduceConfig | None:
    """Tiles that hold a whole row of x, so that x is read once; None where two launches are better.

    The rows are split by sizes alone, so that the sum has one order on every machine, with partial sums of at most
    PARTIAL_BYTES or a quarter of x.
    """
    single = dtype == torch.float32
    block_f, block_l = _two_powers(features)
    block_o = power_of_two(width, at_most=32 if single else 64)
    # Rows of 16 KB or less, 8 in fp32, beside a factor's tile that the stages hold as well.
    block_r = power_of_two((2048 if single else 8192) // (block_f + block_l), at_most=32 if single else 64)
    warps = 4 if (block_f + block_l) * max(block_r, block_o) <= (1024 if single else 2048) else 8
    most = max(PARTIAL_BYTES, rows * features * dtype.itemsize // 4) // (4 * features * width)
    split = max(1, min(SHRINK_REDUCE_PROGRAMS // blocks(width, block_o), most, blocks(rows, block_r)))
    config = ShrinkReduceConfig(block_r, block_f, block_l, block_o, split, warps, 2)
    return None if config.reasons(dtype, rows, features, width) else config


def shrink_reduce_candidates(
    dtype: torch.dtype, rows: int, features: int, width: int
) -> Iterator[ShrinkReduceConfig]:
    """The rule's, then with rows shared by half and by twice as many programs, other warps and a stage more."""
    rule = shrink_reduce_config(dtype, rows, features, width)
    if rule is None:
        return
    splits = dict.fromkeys(
        (rule.split, max(1, rule.split // 2), min(2 * rule.split, blocks(rows, rule.block_r)))
    )
    for split, warps, stages in product(
        splits, (rule.warps, 12 - rule.warps), (rule.stages, rule.stages + 1)
    ):
        yield replace(rule, split=split, warps=warps, stages=stages)
