"""out = scale · Σ over the first dimension of fp32 partial sums, in a fixed order: the second stage of every split."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..triton_common import scale_value, slot_arguments, slot_scales
from . import tuning

SLOTS = 4
"""Sums that one launch finishes."""
TILE, MOST_SPLITS = 4096, 256
"""Partial sums that a program holds, and at most so many of one element: their loads are all under way together."""
WAITING_BYTES = 64 << 20
"""Partial sums that wait for others to share a launch with."""


@triton.jit
def _sum_block(
    partial_ptr, out_ptr, scale, scale_ptr, split, elements, block, BLOCK_S: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Elements block·TILE/BLOCK_S … of one output."""
    BLOCK_E: tl.constexpr = TILE // BLOCK_S
    index = block.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = index < elements
    acc = tl.zeros([BLOCK_E], dtype=tl.float32)
    for s in range(0, split, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        parts = tl.load(
            partial_ptr + offs_s[:, None].to(tl.int64) * elements + index[None, :],
            mask=(offs_s < split)[:, None] & mask[None, :],
            other=0.0,
        )  # [BLOCK_S, BLOCK_E]
        acc += tl.sum(parts, 0)
    # Rounding point: the whole sum, once.
    tl.store(out_ptr + index, (acc * scale_value(scale, scale_ptr)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_kernel(
    partial0_ptr,
    partial1_ptr,
    partial2_ptr,
    partial3_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    out3_ptr,
    scale0,
    scale1,
    scale2,
    scale3,
    scale0_ptr,
    scale1_ptr,
    scale2_ptr,
    scale3_ptr,
    split0,
    split1,
    split2,
    split3,
    elements0,
    elements1,
    elements2,
    elements3,
    BLOCK_S0: tl.constexpr,
    BLOCK_S1: tl.constexpr,
    BLOCK_S2: tl.constexpr,
    BLOCK_S3: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0)
    blocks = tl.cdiv(elements0, TILE // BLOCK_S0)
    if block < blocks:
        _sum_block(partial0_ptr, out0_ptr, scale0, scale0_ptr, split0, elements0, block, BLOCK_S0, TILE)
    if partial1_ptr is not None:
        block -= blocks
        blocks = tl.cdiv(elements1, TILE // BLOCK_S1)
        if (block >= 0) & (block < blocks):
            _sum_block(partial1_ptr, out1_ptr, scale1, scale1_ptr, split1, elements1, block, BLOCK_S1, TILE)
    if partial2_ptr is not None:
        block -= blocks
        blocks = tl.cdiv(elements2, TILE // BLOCK_S2)
        if (block >= 0) & (block < blocks):
            _sum_block(partial2_ptr, out2_ptr, scale2, scale2_ptr, split2, elements2, block, BLOCK_S2, TILE)
    if partial3_ptr is not None:
        block -= blocks
        if block >= 0:
            _sum_block(partial3_ptr, out3_ptr, scale3, scale3_ptr, split3, elements3, block, BLOCK_S3, TILE)


class PartialSum(NamedTuple):
    """out = scale · Σ_s partial[s].

    partial: (splits, ...)  fp32, contiguous
    out:     (...)          contiguous, any dtype
    """

    partial: Tensor
    out: Tensor
    scale: float | Tensor


class SecondStages:
    """Sums whose partial sums have been launched: `finish` launches the rest of them, SLOTS at a time."""

    def __init__(self) -> None:
        self._pending: list[PartialSum] = []
        self._waiting_bytes = 0

    def add(self, partial: Tensor, out: Tensor, scale: float | Tensor) -> None:
        """Adds one sum, as `PartialSum` has it; with too many bytes of partial sums, those so far are finished."""
        self._pending.append(PartialSum(partial, out, scale))
        self._waiting_bytes += partial.nbytes
        if self._waiting_bytes > WAITING_BYTES:
            self.finish()

    def finish(self) -> None:
        """Writes every output that was added."""
        for start in range(0, len(self._pending), SLOTS):
            sum_partials(self._pending[start : start + SLOTS])
        self._pending, self._waiting_bytes = [], 0


def block_splits(split: int) -> int:
    """How many partial sums of an element are added at a time: by their number alone, whatever shares the launch."""
    return min(MOST_SPLITS, 1 << (split - 1).bit_length())


def sum_partials(sums: list[PartialSum]) -> None:
    """Writes the outputs of up to SLOTS sums, from one launch."""
    assert len(sums) <= SLOTS
    partials, outs, scales = zip(*sums, strict=True)
    splits, elements = [each.shape[0] for each in partials], [out.numel() for out in outs]
    for partial, out, split, size in zip(partials, outs, splits, elements, strict=True):
        assert partial.is_contiguous()
        assert out.is_contiguous()
        assert partial.numel() == split * size
    blocks_s = [block_splits(split) for split in splits]
    arguments = {
        **slot_arguments("partial{}_ptr", partials, SLOTS),
        **slot_arguments("out{}_ptr", outs, SLOTS),
        **slot_scales(scales, SLOTS),
        **slot_arguments("split{}", splits, SLOTS, 0),
        **slot_arguments("elements{}", elements, SLOTS, 0),
    }
    programs = sum(
        tuning.blocks(size, TILE // block_s) for size, block_s in zip(elements, blocks_s, strict=True)
    )
    constants = {**slot_arguments("BLOCK_S{}", blocks_s, SLOTS, 1), "TILE": TILE}
    launch(_sum_kernel, programs, sums[0].out.device, arguments, constants, 4, 1)
