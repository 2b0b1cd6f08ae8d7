"""T = scale · x Dᵀ over rows (m, g): the down map of thin terms and of every I ⊗ B, several maps at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture_of, launch
from ..outputs import new_output
from ..triton_common import (
    aligned_run,
    dot,
    dot_precision,
    scale_value,
    slot_arguments,
    slot_scales,
    split_rows,
)
from . import reduction_tuning, tuning
from .beside_kernel import Beside, build_beside
from .maps import KronMap
from .sum_kernel import SecondStages


@triton.jit
def _store_columns(acc, t_ptr, scale, scale_ptr, first, width, row, row_mask, offs_w):
    """Stores columns first … first + width - 1 of the accumulator into T (rows, width)."""
    columns = offs_w - first
    mask = row_mask[:, None] & (columns >= 0)[None, :] & (columns < width)[None, :]
    # Rounding point 1: T contains the scale.
    value = (acc * scale_value(scale, scale_ptr)).to(t_ptr.dtype.element_ty)
    tl.store(t_ptr + row[:, None] * width + columns[None, :], value, mask=mask)


@triton.jit
def _own_columns(lines, d_ptr, first, offs_w, stride_dw):
    """`lines`, but the addresses of this map's D from column `first` on."""
    own = d_ptr + (offs_w - first).to(tl.int64) * stride_dw
    return tl.where(offs_w >= first, own, lines)


@triton.jit
def _shrink_tile(
    pid,
    x_ptr,
    d0_ptr,
    d1_ptr,
    d2_ptr,
    d3_ptr,
    in_scale_ptr,
    partial_ptr,
    t0_ptr,
    t1_ptr,
    t2_ptr,
    t3_ptr,
    scale0,
    scale1,
    scale2,
    scale3,
    scale0_ptr,
    scale1_ptr,
    scale2_ptr,
    scale3_ptr,
    first1,
    first2,
    first3,
    width0,
    width1,
    width2,
    width3,
    rows,
    W,
    K,
    k_per_split,
    stride_xm,
    stride_xg,
    stride_xk,
    stride_dw,
    stride_dk,
    stride_sg,
    stride_sk,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of T, or of its partial sums."""
    column_blocks = tl.cdiv(W, BLOCK_W)
    pid_split = pid % SPLIT
    pid_w = (pid // SPLIT) % column_blocks
    first_row = (pid // (SPLIT * column_blocks)).to(tl.int64) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    m, g = split_rows(first_row, GROUP, BLOCK_M)
    offs_w = pid_w * BLOCK_W + tl.arange(0, BLOCK_W)
    x_lines = m * stride_xm + g.to(tl.int64) * stride_xg
    # What the compiler cannot see: rows that begin at a multiple of RUN elements.
    if RUN > 1:
        x_lines = tl.multiple_of(x_lines, RUN)
    x_rows = x_ptr + x_lines
    # Each column has one D: its address is chosen once, so that one tile of the factors is loaded, not one a map.
    d_lines = d0_ptr + offs_w.to(tl.int64) * stride_dw
    if d1_ptr is not None:
        d_lines = _own_columns(d_lines, d1_ptr, first1, offs_w, stride_dw)
    if d2_ptr is not None:
        d_lines = _own_columns(d_lines, d2_ptr, first2, offs_w, stride_dw)
    if d3_ptr is not None:
        d_lines = _own_columns(d_lines, d3_ptr, first3, offs_w, stride_dw)
    begin = pid_split * k_per_split
    end = tl.minimum(begin + k_per_split, K)
    acc = tl.zeros([BLOCK_M, BLOCK_W], dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_mask = row_mask[:, None]
        if not EVEN_K:
            x_mask = x_mask & (offs_k < end)[None, :]
        x_tile = tl.load(x_rows[:, None] + offs_k[None, :].to(tl.int64) * stride_xk, mask=x_mask, other=0.0)
        if in_scale_ptr is not None:
            scale_offsets = g[:, None].to(tl.int64) * stride_sg + offs_k[None, :].to(tl.int64) * stride_sk
            in_scale = tl.load(in_scale_ptr + scale_offsets, mask=x_mask, other=0.0).to(tl.float32)
            # Rounding point 0: the scaled input is rounded as x itself was.
            x_tile = (x_tile.to(tl.float32) * in_scale).to(x_tile.dtype)
        d_mask = (offs_w < W)[None, :]
        if not EVEN_K:
            d_mask = d_mask & (offs_k < end)[:, None]
        d_tile = tl.load(d_lines[None, :] + offs_k[:, None].to(tl.int64) * stride_dk, mask=d_mask, other=0.0)
        # Rounding point 0: a factor of another dtype.
        acc = dot(x_tile, d_tile.to(x_tile.dtype), acc, PRECISION)
    if SPLIT > 1:
        # Partial sums: of each T on its own, (SPLIT, rows, width), one T after the other.
        line = pid_split.to(tl.int64) * rows + row
        step = tl.full([], SPLIT, tl.int64) * rows
        _store_columns(acc, partial_ptr, 1.0, None, 0, width0, line, row_mask, offs_w)
        if t1_ptr is not None:
            _store_columns(
                acc, partial_ptr + step * first1, 1.0, None, first1, width1, line, row_mask, offs_w
            )
        if t2_ptr is not None:
            _store_columns(
                acc, partial_ptr + step * first2, 1.0, None, first2, width2, line, row_mask, offs_w
            )
        if t3_ptr is not None:
            _store_columns(
                acc, partial_ptr + step * first3, 1.0, None, first3, width3, line, row_mask, offs_w
            )
    else:
        _store_columns(acc, t0_ptr, scale0, scale0_ptr, 0, width0, row, row_mask, offs_w)
        if t1_ptr is not None:
            _store_columns(acc, t1_ptr, scale1, scale1_ptr, first1, width1, row, row_mask, offs_w)
        if t2_ptr is not None:
            _store_columns(acc, t2_ptr, scale2, scale2_ptr, first2, width2, row, row_mask, offs_w)
        if t3_ptr is not None:
            _store_columns(acc, t3_ptr, scale3, scale3_ptr, first3, width3, row, row_mask, offs_w)


@triton.jit
def _shrink_kernel(
    x_ptr,
    d0_ptr,
    d1_ptr,
    d2_ptr,
    d3_ptr,
    in_scale_ptr,
    partial_ptr,
    t0_ptr,
    t1_ptr,
    t2_ptr,
    t3_ptr,
    scale0,
    scale1,
    scale2,
    scale3,
    scale0_ptr,
    scale1_ptr,
    scale2_ptr,
    scale3_ptr,
    first1,
    first2,
    first3,
    width0,
    width1,
    width2,
    width3,
    rows,
    W,
    K,
    k_per_split,
    stride_xm,
    stride_xg,
    stride_xk,
    stride_dw,
    stride_dk,
    stride_sg,
    stride_sk,
    factor0_ptr,
    factor1_ptr,
    factor2_ptr,
    factor3_ptr,
    up0_ptr,
    up1_ptr,
    up2_ptr,
    up3_ptr,
    up_features,
    up_width,
    F1,
    F2,
    T2,
    stride_uf,
    stride_ut,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPS: tl.constexpr,
    MIX: tl.constexpr,
    SHUFFLED: tl.constexpr,
    UP_F: tl.constexpr,
    UP_T: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(W, BLOCK_W) * SPLIT
    pid = tl.program_id(0)
    if UPS > 0 and pid >= tiles:
        build_beside(
            pid - tiles, factor0_ptr, factor1_ptr, factor2_ptr, factor3_ptr, up0_ptr, up1_ptr, up2_ptr, up3_ptr,
            up_features, up_width, F1, F2, T2, stride_uf, stride_ut, MIX, SHUFFLED, UP_F, UP_T,
        )  # fmt: skip
    if UPS == 0 or pid < tiles:
        _shrink_tile(
            pid, x_ptr, d0_ptr, d1_ptr, d2_ptr, d3_ptr, in_scale_ptr, partial_ptr, t0_ptr, t1_ptr, t2_ptr, t3_ptr,
            scale0, scale1, scale2, scale3, scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr, first1, first2, first3,
            width0, width1, width2, width3, rows, W, K, k_per_split, stride_xm, stride_xg, stride_xk, stride_dw,
            stride_dk, stride_sg, stride_sk, GROUP, RUN, EVEN_K, SPLIT, PRECISION, BLOCK_M, BLOCK_W, BLOCK_K,
        )  # fmt: skip


SLOTS = 4
"""Maps that one launch serves."""
FIRSTS = tuple(f"first{slot}" for slot in range(1, SLOTS))


class Down(NamedTuple):
    """One map: D (width, K), in any strides, and the scale of its products."""

    d: Tensor
    scale: float | Tensor

    @property
    def width(self) -> int:
        """Columns of T."""
        return self.d.shape[0]


def shrink_rows(
    view: Tensor,
    downs: Sequence[Down],
    in_scale: Tensor | None,
    ups: Sequence[KronMap] = (),
    config: reduction_tuning.ShrinkConfig | None = None,
) -> list[Tensor]:
    """T[i] (M, G·width[i]) = scale[i] · (in_scale ⊙ x) D[i]ᵀ, from one read of x.

    view:     (M, G, K)  x, in any strides
    downs:    up to SLOTS, their D in the same strides and dtype
    in_scale: (G, K)     multiplies x
    ups:      maps whose L is built beside, as `Beside` has them
    config:   None for the one that `tuning` chooses
    """
    assert len(downs) <= SLOTS
    assert all(each.d.dtype == downs[0].d.dtype for each in downs)
    tokens, group, features = view.shape
    rows, total = tokens * group, sum(each.width for each in downs)
    stride_dw, stride_dk = downs[0].d.stride()
    outputs = [new_output(view, (tokens, group * each.width)) for each in downs]
    if rows == 0:
        return outputs
    config = config or reduction_tuning.shrink_choice(
        architecture_of(view.device), view.dtype, rows, total, features
    )
    partial = None if config.split == 1 else new_output(view, (config.split * rows * total,), torch.float32)
    widths = [each.width for each in downs]
    firsts = list(accumulate(widths))[:-1]
    beside = Beside(ups, view.dtype)
    arguments = {
        "x_ptr": view,
        **slot_arguments("d{}_ptr", [each.d for each in downs], SLOTS),
        "in_scale_ptr": in_scale,
        "partial_ptr": partial,
        **slot_arguments("t{}_ptr", outputs, SLOTS),
        **slot_scales([each.scale for each in downs], SLOTS),
        **dict(zip(FIRSTS, [*firsts, *[total] * (SLOTS - 1 - len(firsts))], strict=True)),
        **slot_arguments("width{}", widths, SLOTS, 0),
        "rows": rows,
        "W": total,
        "K": features,
        "k_per_split": config.k_per_split,
        "stride_xm": view.stride(0),
        "stride_xg": view.stride(1),
        "stride_xk": view.stride(2),
        "stride_dw": stride_dw,
        "stride_dk": stride_dk,
        "stride_sg": 0 if in_scale is None else in_scale.stride(0),
        "stride_sk": 0 if in_scale is None else in_scale.stride(1),
        **beside.arguments,
    }
    constants = {
        "GROUP": group,
        "RUN": aligned_run(view.stride(2), features, view.stride(0), view.stride(1)),
        "EVEN_K": features % config.block_k == 0,
        "SPLIT": config.split,
        "PRECISION": dot_precision(view.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_W": config.block_w,
        "BLOCK_K": config.block_k,
        **beside.constants,
    }
    programs = tuning.blocks(rows, config.block_m) * tuning.blocks(total, config.block_w) * config.split
    programs += beside.programs
    launch(_shrink_kernel, programs, view.device, arguments, constants, config.warps, config.stages)
    beside.keep()
    if partial is not None:
        stages, first = SecondStages(), 0
        for each, output in zip(downs, outputs, strict=True):
            elements = config.split * rows * each.width
            stages.add(partial[first : first + elements].view(config.split, -1), output, each.scale)
            first += elements
        stages.finish()
    return outputs
