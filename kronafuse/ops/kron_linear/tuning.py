"""Which tile sizes the Triton kernels run with: the row of the tuned table for this GPU and these sizes, else a rule.

A rule takes the shipped candidate of the least predicted time (`costs.py`); no GPU has measured one. Nothing is
searched at run time, and except for the linear kernel's tiles, which follow the GPU, a rule's choice depends on sizes
and dtype alone: the order of every sum, and so every bit of the result, is the same at each call and, without rows of
the table, on each machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch

from .. import tuned
from ..costs import PEAKS, REFERENCE, blocks, shared_limit
from ..kernel_costs import LinearSizes, OnePassSizes, linear_us, one_pass_us, reduce_us, shrink_us
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
        shared_bytes = self.stages * self.block_k * (self.block_m + self.block_w) * dtype.itemsize
        return resources(architecture, shared_bytes, self.block_m * self.block_w // (32 * self.warps))


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
    block_k = power_of_two(features, at_most=32 if single else 64)
    for block_m, split, (warps, stages) in product(heights, SPLITS, ((4, 3), (4, 4), (8, 3), (4, 2))):
        k_per_split = blocks(blocks(features, block_k), split) * block_k
        if blocks(features, k_per_split) == split:
            yield ShrinkConfig(block_m, block_w, block_k, split, k_per_split, warps, stages)


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
        shared_bytes = self.stages * self.block_i * (self.block_o + self.block_j) * dtype.itemsize
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
    descriptors: bool,
) -> OnePassConfig:
    """The configuration for A (O1, I1) = left and B (O2, I2) = right."""
    return tuned.choose(
        "one_pass",
        OnePassConfig,
        architecture,
        (dtype, tokens, *left, *right, has_weight, descriptors),
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
    """The valid configuration of the least predicted time; arguments as in `one_pass_choice`."""
    sizes = OnePassSizes(tokens, left, right, has_weight)
    return min(
        one_pass_candidates(architecture, dtype, left[0], right[0], descriptors),
        key=lambda config: one_pass_us(architecture, dtype, sizes, config),
    )


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
