"""Predicted time of each kernel, with all that its configuration makes it launch, from its sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch

from .costs import Work, blocks, predicted_us, reads_of, sum_us
from .launch import Architecture

if TYPE_CHECKING:
    from .bottleneck.tuning import BottleneckConfig
    from .kron_linear.one_pass_tuning import OnePassConfig
    from .kron_linear.reduction_tuning import MixConfig, ReduceConfig, ShrinkConfig, ShrinkReduceConfig
    from .kron_linear.tuning import LinearConfig


@dataclass(frozen=True)
class LinearSizes:
    """Sizes of the GEMM with tails; K = 0 without W.

    tail_width: columns of T that a tile of the result multiplies by dots, all tails together
    fma_width:  columns of T that each element of the result multiplies one by one
    base:       whether a base is read
    """

    tokens: int
    features: int
    in_features: int
    tail_width: int = 0
    fma_width: int = 0
    base: bool = False


def linear_us(
    architecture: Architecture, dtype: torch.dtype, sizes: LinearSizes, config: LinearConfig
) -> float:
    """The GEMM with tails: loop of BLOCK_K, then of BLOCK_R; W or x again where a band of tiles does not keep them."""
    rows, columns = blocks(sizes.tokens, config.block_m), blocks(sizes.features, config.block_n)
    depth = blocks(sizes.in_features, config.block_k) * config.block_k
    tail = blocks(sizes.tail_width, config.block_r) * config.block_r
    x_bytes = sizes.tokens * sizes.in_features * dtype.itemsize
    w_bytes = sizes.features * sizes.in_features * dtype.itemsize
    band_bytes = min(sizes.tokens, config.group_m * config.block_m) * sizes.in_features * dtype.itemsize
    t_bytes = (sizes.tokens + sizes.features) * sizes.tail_width * dtype.itemsize
    t_bytes += sizes.tokens * sizes.fma_width * dtype.itemsize
    y_bytes = sizes.tokens * sizes.features * dtype.itemsize * (2 if sizes.base else 1)
    # Tiles of one wave read the same part of K at a time: only the next wave may find x gone.
    waves = blocks(min(rows, config.group_m) * columns, architecture.multiprocessors)
    memory = (
        w_bytes * reads_of(architecture, blocks(rows, config.group_m), w_bytes + band_bytes)
        + x_bytes * reads_of(architecture, waves, band_bytes)
        + t_bytes
        + y_bytes
    )
    steps = max(1.0, (depth + tail) / config.block_k)
    line_bytes = (config.block_m + config.block_n) * dtype.itemsize
    tile = config.block_m * config.block_n
    return predicted_us(
        architecture,
        dtype,
        Work(
            rows * columns, steps, config.block_m, config.block_n, config.block_k,
            line_bytes * (depth + tail) / steps, memory, config.stages * config.block_k * line_bytes,
            config.warps, config.stages, fma=sizes.fma_width * tile / steps,
        ),
    )  # fmt: skip


def block_tail_width(block_n: int, groups: int, features: int, width: int) -> int:
    """Columns of T that a tile of BLOCK_N multiplies by blocks: `width` a group of `features` that it touches.

    On average, as tiles start at multiples of BLOCK_N; there are `groups` groups.
    """
    return round(min(groups, 1 + (block_n - gcd(block_n, features)) / features) * width)


@dataclass(frozen=True)
class OnePassSizes:
    """Sizes of the one-pass form: A (O1, I1) = left, B (O2, I2) = right, and whether W and a base are read."""

    tokens: int
    left: tuple[int, int]
    right: tuple[int, int]
    weight: bool = True
    base: bool = False


def one_pass_us(
    architecture: Architecture, dtype: torch.dtype, sizes: OnePassSizes, config: OnePassConfig
) -> float:
    """The GEMM that mixes x's tiles as it reads them: a step for each i1, then one product a group with B."""
    (o1, i1), (o2, i2) = sizes.left, sizes.right
    item, tokens = dtype.itemsize, sizes.tokens
    depth = blocks(i2, config.block_k) * config.block_k
    products = (i1 if sizes.weight else 0) + config.groups
    columns_read = config.block_n * products / i1
    w_bytes = o1 * o2 * i1 * i2 * item if sizes.weight else 0
    bands = blocks(blocks(tokens, config.block_m), config.group_m)
    x_bytes, y_bytes = tokens * i1 * i2 * item, tokens * o1 * o2 * item
    memory = x_bytes + y_bytes * (2 if sizes.base else 1) + w_bytes * reads_of(architecture, bands, w_bytes)
    work = Work(
        config.programs(tokens, o1 * o2), depth // config.block_k * i1, config.block_m, config.block_n,
        max(1, config.block_k * products // i1), (config.block_m + columns_read) * config.block_k * item, memory,
        config.stages * config.block_k * (config.block_m + config.block_n) * item, config.warps, config.stages,
        fma=config.groups * config.block_m * config.block_k,
        held=one_pass_held(config.groups, config.block_m, config.block_n, config.block_k, item),
    )  # fmt: skip
    return predicted_us(architecture, dtype, work)


def one_pass_held(groups: int, block_m: int, block_n: int, block_k: int, itemsize: int) -> int:
    """Registers beside accumulators: A X of each group and x's tile in fp32, B's next block in the operands' dtype."""
    return (groups + 1) * block_m * block_k + block_k * block_n * itemsize // 4


def shrink_us(
    architecture: Architecture, dtype: torch.dtype, rows: int, width: int, features: int, config: ShrinkConfig
) -> float:
    """The down map: x once, and the sum of the partial results where K is split."""
    tiles = blocks(rows, config.block_m) * blocks(width, config.block_w)
    line_bytes = (config.block_m + config.block_w) * dtype.itemsize
    t_itemsize = 4 * config.split if config.split > 1 else dtype.itemsize
    memory = (rows + width) * features * dtype.itemsize + rows * width * t_itemsize
    steps = blocks(config.k_per_split, config.block_k)
    work = Work(
        tiles * config.split, steps, config.block_m, config.block_w, config.block_k, config.block_k * line_bytes,
        memory, config.stages * config.block_k * line_bytes, config.warps, config.stages,
    )  # fmt: skip
    return predicted_us(architecture, dtype, work) + sum_us(
        architecture, config.split, rows * width, dtype.itemsize
    )


def mix_us(
    architecture: Architecture, dtype: torch.dtype, elements: int, out: int, features: int, config: MixConfig
) -> float:
    """A P: P once and the result once; A's tiles are small."""
    programs = blocks(elements, config.block_j) * blocks(out, config.block_o)
    line_bytes = (config.block_o + config.block_j) * dtype.itemsize
    work = Work(
        programs, blocks(features, config.block_i), config.block_o, config.block_j, config.block_i,
        config.block_i * line_bytes, elements * (features + out) * dtype.itemsize,
        config.stages * config.block_i * line_bytes, config.warps, config.stages,
    )  # fmt: skip
    return predicted_us(architecture, dtype, work)


def reduce_us(
    architecture: Architecture, dtype: torch.dtype, rows: int, height: int, width: int, config: ReduceConfig
) -> float:
    """A factor's gradient: both operands once, and the sum of the partial results where the rows are split."""
    tiles = blocks(height, config.block_p) * blocks(width, config.block_q)
    line_bytes = (config.block_p + config.block_q) * dtype.itemsize
    result = height * width * (4 * config.split if config.split > 1 else dtype.itemsize)
    work = Work(
        tiles * config.split, blocks(blocks(rows, config.block_r), config.split), config.block_p, config.block_q,
        config.block_r, config.block_r * line_bytes, rows * (height + width) * dtype.itemsize + result,
        config.stages * config.block_r * line_bytes, config.warps, config.stages,
    )  # fmt: skip
    return predicted_us(architecture, dtype, work) + sum_us(
        architecture, config.split, height * width, dtype.itemsize
    )


def shrink_reduce_us(
    architecture: Architecture,
    dtype: torch.dtype,
    rows: int,
    features: int,
    width: int,
    config: ShrinkReduceConfig,
) -> float:
    """The down map and its factor's gradient: x once, T' and T once, two products a step."""
    columns = blocks(width, config.block_o)
    steps = blocks(blocks(rows, config.block_r), config.split)
    step_bytes = config.block_r * (config.held + config.block_o) + config.held * config.block_o
    result = features * width * (4 * config.split if config.split > 1 else dtype.itemsize)
    # Both products have as many multiply-adds: one of twice the depth stands for them.
    work = Work(
        columns * config.split, steps, config.block_r, config.block_o, 2 * config.held,
        step_bytes * dtype.itemsize, rows * (features + 2 * width) * dtype.itemsize + result,
        config.stages * step_bytes * dtype.itemsize, config.warps, config.stages,
    )  # fmt: skip
    return predicted_us(architecture, dtype, work) + sum_us(
        architecture, config.split, features * width, dtype.itemsize
    )


@dataclass(frozen=True)
class BottleneckSizes:
    """Sizes of a pass through the hidden layer: features read, the hidden width H, features written."""

    tokens: int
    in_features: int
    width: int
    out_features: int


def bottleneck_us(
    architecture: Architecture,
    dtype: torch.dtype,
    widest: torch.dtype,
    sizes: BottleneckSizes,
    config: BottleneckConfig,
) -> float:
    """Both products of a block of rows; programs that share its columns all compute the hidden layer."""
    hidden = config.width + config.second
    rows, item = config.block_m, dtype.itemsize
    inner, outer = blocks(sizes.in_features, config.block_in), blocks(config.columns, config.block_out)
    steps = inner + outer
    depth = (inner * config.block_in + outer * config.block_out) / steps
    factor_bytes = (sizes.in_features + sizes.out_features) * sizes.width * item
    read_bytes = sizes.tokens * sizes.in_features * widest.itemsize
    memory = (
        read_bytes
        * reads_of(architecture, config.split, factor_bytes + rows * sizes.in_features * widest.itemsize)
        + 2 * sizes.tokens * sizes.out_features * widest.itemsize
        + sizes.tokens * sizes.width * item
        + factor_bytes
    )
    step_bytes = depth * (rows * widest.itemsize + hidden * item)
    shared = config.stages * config.block_in * (rows * widest.itemsize + hidden * item) + rows * hidden * item
    work = Work(
        blocks(sizes.tokens, rows) * config.split, steps, rows, hidden, int(depth), step_bytes, memory, shared,
        config.warps, config.stages,
    )  # fmt: skip
    return predicted_us(architecture, dtype, work)
