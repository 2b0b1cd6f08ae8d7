"""T = scale · x F and the gradient Σ xᵀ q of F, from one read of x: the down map of dy and one factor's gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..outputs import new_output
from ..triton_common import dot, dot_precision, row_runs, scale_arguments, scale_value, split_rows
from . import reduction_tuning, tuning
from .beside_kernel import Beside, build_beside
from .maps import KronMap
from .sum_kernel import SecondStages


@triton.jit
def _load_features(
    x_ptr,
    in_scale_ptr,
    offs_f,
    F,
    m,
    g,
    row_mask,
    stride_xm,
    stride_xg,
    stride_xf,
    stride_sg,
    stride_sf,
    FEATURES_FIRST: tl.constexpr,
    RUN: tl.constexpr,
):
    """[BLOCK_R, features] of x, scaled; loaded along its neighbouring elements."""
    lines, columns = m * stride_xm + g * stride_xg, offs_f.to(tl.int64) * stride_xf
    scale_lines, scale_columns = g * stride_sg, offs_f.to(tl.int64) * stride_sf
    if FEATURES_FIRST:
        if RUN > 1:
            lines = tl.max_contiguous(tl.multiple_of(lines, RUN), RUN)
            columns = tl.multiple_of(columns, RUN)
        mask = (offs_f < F)[:, None] & row_mask[None, :]
        offsets, scale_offsets = (
            columns[:, None] + lines[None, :],
            scale_columns[:, None] + scale_lines[None, :],
        )
    else:
        if RUN > 1:
            lines = tl.multiple_of(lines, RUN)
        mask = row_mask[:, None] & (offs_f < F)[None, :]
        offsets, scale_offsets = (
            lines[:, None] + columns[None, :],
            scale_lines[:, None] + scale_columns[None, :],
        )
    x_tile = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if in_scale_ptr is not None:
        in_scale = tl.load(in_scale_ptr + scale_offsets, mask=mask, other=0.0).to(tl.float32)
        # Rounding point 0: the scaled input is rounded as x itself was.
        x_tile = (x_tile.to(tl.float32) * in_scale).to(x_tile.dtype)
    if FEATURES_FIRST:
        x_tile = tl.trans(x_tile)
    return x_tile


@triton.jit
def _load_factor(f_ptr, dtype: tl.constexpr, offs_f, F, offs_o, O, stride_ff, stride_fo):  # noqa: E741
    """[features, BLOCK_O] of the factor in `dtype`."""
    mask = (offs_f < F)[:, None] & (offs_o < O)[None, :]
    offsets = offs_f[:, None].to(tl.int64) * stride_ff + offs_o[None, :].to(tl.int64) * stride_fo
    # Rounding point 0: a factor of another dtype.
    return tl.load(f_ptr + offsets, mask=mask, other=0.0).to(dtype)


@triton.jit
def _store_gradient(acc, out_ptr, pid_split, offs_f, F, offs_o, O):  # noqa: E741
    """Some features of the gradient, or of this program's partial sum of it."""
    offsets = (pid_split * F + offs_f).to(tl.int64)[:, None] * O + offs_o[None, :]
    mask = (offs_f < F)[:, None] & (offs_o < O)[None, :]
    # Rounding point: none into fp32 partial sums, once into the factor's dtype.
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shrink_reduce_rows(
    pid,
    x_ptr,
    in_scale_ptr,
    f_ptr,
    q_ptr,
    t_ptr,
    out_ptr,
    scale,
    scale_ptr,
    rows,
    steps,
    stride_xm,
    stride_xg,
    stride_xf,
    stride_sg,
    stride_sf,
    stride_ff,
    stride_fo,
    stride_qm,
    stride_qg,
    stride_qo,
    stride_tm,
    stride_tg,
    stride_to,
    GROUP: tl.constexpr,
    F: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    FEATURES_FIRST: tl.constexpr,
    RUN: tl.constexpr,
    ALONG_O: tl.constexpr,
    RUN_O: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Some rows of T, and their part of the gradient."""
    o_blocks: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    # The column blocks of one split are neighbours: they read the same rows.
    pid_split = pid // o_blocks
    offs_o = (pid % o_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    wide_o, mask_o = offs_o.to(tl.int64), offs_o < O
    # All features of a row in one power of two, or in two where that pads less.
    offs_f = tl.arange(0, BLOCK_F)
    acc = tl.zeros([BLOCK_F, BLOCK_O], dtype=tl.float32)
    offs_l, acc_l = offs_f, acc
    if BLOCK_L > 0:
        offs_l = BLOCK_F + tl.arange(0, BLOCK_L)
        acc_l = tl.zeros([BLOCK_L, BLOCK_O], dtype=tl.float32)
    begin = pid_split.to(tl.int64) * steps * BLOCK_R
    for step in range(steps):
        first = begin + step * BLOCK_R
        row_mask = first + tl.arange(0, BLOCK_R) < rows
        m, g = split_rows(first, GROUP, BLOCK_R)
        g = g.to(tl.int64)
        mask = row_mask[:, None] & mask_o[None, :]
        q_lines, q_columns = m * stride_qm + g * stride_qg, wide_o * stride_qo
        t_lines, t_columns = m * stride_tm + g * stride_tg, wide_o * stride_to
        # What the compiler cannot see: neighbours that begin at a multiple of their number.
        if RUN_O > 1:
            q_lines, t_lines = tl.multiple_of(q_lines, RUN_O), tl.multiple_of(t_lines, RUN_O)
            if ALONG_O:
                q_lines, t_lines = tl.max_contiguous(q_lines, RUN_O), tl.max_contiguous(t_lines, RUN_O)
                q_columns, t_columns = tl.multiple_of(q_columns, RUN_O), tl.multiple_of(t_columns, RUN_O)
        q_tile = tl.load(q_ptr + q_lines[:, None] + q_columns[None, :], mask=mask, other=0.0)
        x_tile = _load_features(
            x_ptr, in_scale_ptr, offs_f, F, m, g, row_mask, stride_xm, stride_xg, stride_xf, stride_sg, stride_sf,
            FEATURES_FIRST, RUN,
        )  # fmt: skip
        dtype: tl.constexpr = x_tile.dtype
        # Inside the loop: held across it, the factor would fill the registers.
        f_tile = _load_factor(f_ptr, dtype, offs_f, F, offs_o, O, stride_ff, stride_fo)
        t = dot(x_tile, f_tile, tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32), PRECISION)
        acc = dot(tl.trans(x_tile), q_tile, acc, PRECISION)
        if BLOCK_L > 0:
            l_tile = _load_features(
                x_ptr, in_scale_ptr, offs_l, F, m, g, row_mask, stride_xm, stride_xg, stride_xf, stride_sg, stride_sf,
                FEATURES_FIRST, RUN,
            )  # fmt: skip
            f_tile = _load_factor(f_ptr, dtype, offs_l, F, offs_o, O, stride_ff, stride_fo)
            t = dot(l_tile, f_tile, t, PRECISION)
            acc_l = dot(tl.trans(l_tile), q_tile, acc_l, PRECISION)
        # Rounding point 1: T contains the scale.
        t = (t * scale_value(scale, scale_ptr)).to(t_ptr.dtype.element_ty)
        tl.store(t_ptr + t_lines[:, None] + t_columns[None, :], t, mask=mask)
    _store_gradient(acc, out_ptr, pid_split, offs_f, F, offs_o, O)
    if BLOCK_L > 0:
        _store_gradient(acc_l, out_ptr, pid_split, offs_l, F, offs_o, O)


@triton.jit
def _shrink_reduce_kernel(
    x_ptr,
    in_scale_ptr,
    f_ptr,
    q_ptr,
    t_ptr,
    out_ptr,
    scale,
    scale_ptr,
    rows,
    steps,
    stride_xm,
    stride_xg,
    stride_xf,
    stride_sg,
    stride_sf,
    stride_ff,
    stride_fo,
    stride_qm,
    stride_qg,
    stride_qo,
    stride_tm,
    stride_tg,
    stride_to,
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
    split,
    GROUP: tl.constexpr,
    F: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    FEATURES_FIRST: tl.constexpr,
    RUN: tl.constexpr,
    ALONG_O: tl.constexpr,
    RUN_O: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_O: tl.constexpr,
    UPS: tl.constexpr,
    MIX: tl.constexpr,
    SHUFFLED: tl.constexpr,
    UP_F: tl.constexpr,
    UP_T: tl.constexpr,
):
    programs = split * ((O + BLOCK_O - 1) // BLOCK_O)
    pid = tl.program_id(0)
    if UPS > 0 and pid >= programs:
        build_beside(
            pid - programs, factor0_ptr, factor1_ptr, factor2_ptr, factor3_ptr, up0_ptr, up1_ptr, up2_ptr, up3_ptr,
            up_features, up_width, F1, F2, T2, stride_uf, stride_ut, MIX, SHUFFLED, UP_F, UP_T,
        )  # fmt: skip
    if UPS == 0 or pid < programs:
        _shrink_reduce_rows(
            pid, x_ptr, in_scale_ptr, f_ptr, q_ptr, t_ptr, out_ptr, scale, scale_ptr, rows, steps, stride_xm,
            stride_xg, stride_xf, stride_sg, stride_sf, stride_ff, stride_fo, stride_qm, stride_qg, stride_qo,
            stride_tm, stride_tg, stride_to, GROUP, F, O, FEATURES_FIRST, RUN, ALONG_O, RUN_O, PRECISION, BLOCK_R,
            BLOCK_F, BLOCK_L, BLOCK_O,
        )  # fmt: skip


def _common_runs(q: Tensor, t: Tensor) -> tuple[bool, int]:
    """`row_runs` of both, where they are the same way round."""
    (q_along, q_run), (t_along, t_run) = row_runs(q), row_runs(t)
    return (q_along, min(q_run, t_run)) if q_along == t_along else (False, 1)


def shrink_reduce_rows(
    view: Tensor,
    factor: Tensor,
    scale: float | Tensor,
    in_scale: Tensor | None,
    q: Tensor,
    t: Tensor,
    dtype: torch.dtype,
    config: reduction_tuning.ShrinkReduceConfig,
    stages: SecondStages,
    ups: Sequence[KronMap] = (),
) -> Tensor:
    """Writes t = scale · (in_scale ⊙ x) F and returns Σ_{m,g} (in_scale ⊙ x[m, g])ᵀ q[m, g], (F, O) in `dtype`.

    view:     (M, G, F)  x, in any strides
    factor:   (F, O)     in any strides
    in_scale: (G, F)     multiplies x
    q:        (M, G, O)  in any strides
    t:        (M, G, O)  in any strides
    config:   as `reduction_tuning.shrink_reduce_config` has it
    stages:   what finishes the gradient
    ups:      maps whose L is built beside, as `Beside` has them
    """
    tokens, group, features = view.shape
    width, rows = factor.shape[1], tokens * group
    out = new_output(view, (features, width), dtype)
    target = out
    if config.split > 1:
        target = new_output(view, (config.split, features, width), torch.float32)
    features_first, run = row_runs(view)
    along_o, run_o = _common_runs(q, t)
    beside = Beside(ups, view.dtype)
    arguments = {
        "x_ptr": view,
        "in_scale_ptr": in_scale,
        "f_ptr": factor,
        "q_ptr": q,
        "t_ptr": t,
        "out_ptr": target,
        **scale_arguments(scale),
        "rows": rows,
        "steps": tuning.blocks(tuning.blocks(rows, config.block_r), config.split),
        "stride_xm": view.stride(0),
        "stride_xg": view.stride(1),
        "stride_xf": view.stride(2),
        "stride_sg": 0 if in_scale is None else in_scale.stride(0),
        "stride_sf": 0 if in_scale is None else in_scale.stride(1),
        "stride_ff": factor.stride(0),
        "stride_fo": factor.stride(1),
        "stride_qm": q.stride(0),
        "stride_qg": q.stride(1),
        "stride_qo": q.stride(2),
        "stride_tm": t.stride(0),
        "stride_tg": t.stride(1),
        "stride_to": t.stride(2),
        **beside.arguments,
        "split": config.split,
    }
    constants = {
        "GROUP": group,
        "F": features,
        "O": width,
        "FEATURES_FIRST": features_first,
        "RUN": run,
        "ALONG_O": along_o,
        "RUN_O": run_o,
        "PRECISION": dot_precision(view.dtype),
        "BLOCK_R": config.block_r,
        "BLOCK_F": config.block_f,
        "BLOCK_L": config.block_l,
        "BLOCK_O": config.block_o,
        **beside.constants,
    }
    programs = tuning.blocks(width, config.block_o) * config.split + beside.programs
    launch(_shrink_reduce_kernel, programs, view.device, arguments, constants, config.warps, config.stages)
    beside.keep()
    if target is not out:
        stages.add(target, out, 1.0)
    return out
