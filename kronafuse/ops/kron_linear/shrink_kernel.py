"""T = scale · x Dᵀ over rows (m, g): the down map of thin terms and of every I ⊗ B, several maps at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..outputs import new_output
from ..triton_common import dot, dot_precision, scale_arguments, scale_value, split_rows
from . import tuning
from .sum_kernel import sum_partials


@triton.jit
def _store_columns(acc, t_ptr, scale, scale_ptr, first, width, row, row_mask, offs_w):
    """Stores columns first … first + width - 1 of the accumulator into T (rows, width)."""
    columns = offs_w - first
    mask = row_mask[:, None] & (columns >= 0)[None, :] & (columns < width)[None, :]
    # Rounding point 1: T contains the scale.
    value = (acc * scale_value(scale, scale_ptr)).to(t_ptr.dtype.element_ty)
    tl.store(t_ptr + row[:, None] * width + columns[None, :], value, mask=mask)


@triton.jit
def _shrink_kernel(
    x_ptr,
    d_ptr,
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
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_blocks = tl.cdiv(W, BLOCK_W)
    pid = tl.program_id(0)
    pid_split = pid % SPLIT
    pid_w = (pid // SPLIT) % column_blocks
    first_row = (pid // (SPLIT * column_blocks)).to(tl.int64) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    m, g = split_rows(first_row, GROUP, BLOCK_M)
    offs_w = pid_w * BLOCK_W + tl.arange(0, BLOCK_W)
    x_rows = x_ptr + m * stride_xm + g.to(tl.int64) * stride_xg
    d_rows = d_ptr + offs_w.to(tl.int64) * stride_dw
    begin = pid_split * k_per_split
    end = tl.minimum(begin + k_per_split, K)
    acc = tl.zeros([BLOCK_M, BLOCK_W], dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_mask = row_mask[:, None]
        d_mask = (offs_w < W)[None, :]
        if not EVEN_K:
            x_mask = x_mask & (offs_k < end)[None, :]
            d_mask = d_mask & (offs_k < end)[:, None]
        x_tile = tl.load(x_rows[:, None] + offs_k[None, :].to(tl.int64) * stride_xk, mask=x_mask, other=0.0)
        if in_scale_ptr is not None:
            scale_offsets = g[:, None].to(tl.int64) * stride_sg + offs_k[None, :].to(tl.int64) * stride_sk
            in_scale = tl.load(in_scale_ptr + scale_offsets, mask=x_mask, other=0.0).to(tl.float32)
            # Rounding point 0: the scaled input is rounded as x itself was.
            x_tile = (x_tile.to(tl.float32) * in_scale).to(x_tile.dtype)
        d_tile = tl.load(d_rows[None, :] + offs_k[:, None].to(tl.int64) * stride_dk, mask=d_mask, other=0.0)
        acc = dot(x_tile, d_tile, acc, PRECISION)
    if SPLIT > 1:
        offsets = (pid_split.to(tl.int64) * rows + row)[:, None] * W + offs_w[None, :]
        tl.store(partial_ptr + offsets, acc, mask=row_mask[:, None] & (offs_w < W)[None, :])
    else:
        _store_columns(acc, t0_ptr, scale0, scale0_ptr, 0, width0, row, row_mask, offs_w)
        if t1_ptr is not None:
            _store_columns(acc, t1_ptr, scale1, scale1_ptr, first1, width1, row, row_mask, offs_w)
        if t2_ptr is not None:
            _store_columns(acc, t2_ptr, scale2, scale2_ptr, first2, width2, row, row_mask, offs_w)
        if t3_ptr is not None:
            _store_columns(acc, t3_ptr, scale3, scale3_ptr, first3, width3, row, row_mask, offs_w)


SLOTS = 4
"""Maps that one launch serves."""


class Columns(NamedTuple):
    """Consecutive rows of D that make one T: how many, and the scale of their products."""

    width: int
    scale: float | Tensor


def shrink_rows(
    view: Tensor,
    down: Tensor,
    columns: Sequence[Columns],
    in_scale: Tensor | None,
    config: tuning.ShrinkConfig | None = None,
) -> list[Tensor]:
    """T[i] (M, G·width[i]) = scale[i] · (in_scale ⊙ x) D[i]ᵀ, from one read of x.

    view:     (M, G, K)  x, in any strides
    down:     (W, K)     the D of up to SLOTS maps, one below the other, in any strides
    columns:  widths that sum to W, with their scales
    in_scale: (G, K)     multiplies x
    config:   None for the one that `tuning` chooses
    """
    assert len(columns) <= SLOTS
    tokens, group, features = view.shape
    rows, total = tokens * group, down.shape[0]
    assert sum(each.width for each in columns) == total
    outputs = [new_output(view, (tokens, group * each.width)) for each in columns]
    if rows == 0:
        return outputs
    config = config or tuning.shrink_config(view.dtype, rows, total, features)
    partial = None if config.split == 1 else new_output(view, (config.split, rows, total), torch.float32)
    slots = dict[str, object]()
    first = 0
    for index in range(SLOTS):
        present = index < len(columns)
        each = columns[index] if present else Columns(0, 0.0)
        scaling = scale_arguments(each.scale)
        slots[f"t{index}_ptr"] = outputs[index] if present else None
        slots[f"scale{index}"], slots[f"scale{index}_ptr"] = scaling["scale"], scaling["scale_ptr"]
        slots[f"width{index}"] = each.width
        if index:
            slots[f"first{index}"] = first
        first += each.width
    arguments = {
        "x_ptr": view,
        "d_ptr": down,
        "in_scale_ptr": in_scale,
        "partial_ptr": partial,
        **slots,
        "rows": rows,
        "W": total,
        "K": features,
        "k_per_split": config.k_per_split,
        "stride_xm": view.stride(0),
        "stride_xg": view.stride(1),
        "stride_xk": view.stride(2),
        "stride_dw": down.stride(0),
        "stride_dk": down.stride(1),
        "stride_sg": 0 if in_scale is None else in_scale.stride(0),
        "stride_sk": 0 if in_scale is None else in_scale.stride(1),
    }
    constants = {
        "GROUP": group,
        "EVEN_K": features % config.block_k == 0,
        "SPLIT": config.split,
        "PRECISION": dot_precision(view.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_W": config.block_w,
        "BLOCK_K": config.block_k,
    }
    programs = triton.cdiv(rows, config.block_m) * triton.cdiv(total, config.block_w) * config.split
    launch(_shrink_kernel, programs, view.device, arguments, constants, config.warps, config.stages)
    if partial is not None:
        first = 0
        for each, output in zip(columns, outputs, strict=True):
            sum_partials(partial, output.view(rows, each.width), first, each.scale)
            first += each.width
    return outputs
