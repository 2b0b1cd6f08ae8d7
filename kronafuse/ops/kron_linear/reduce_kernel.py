"""Factor gradients: Σ over tokens and groups of p[m, g, :]ᵀ q[m, g, :], in two stages without atomics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture_of, launch
from ..outputs import new_output
from ..triton_common import (
    dot,
    dot_precision,
    row_runs,
    scale_arguments,
    scale_value,
    slot_arguments,
    split_rows,
)
from . import reduction_tuning, tuning
from .sum_kernel import SecondStages


@triton.jit
def _load_rows(
    p_ptr, offs_p, mask, m, g, stride_pm, stride_pg, stride_pp, ALONG: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """[columns, rows] of one operand, 0 where masked."""
    columns, lines = offs_p.to(tl.int64) * stride_pp, m * stride_pm + g * stride_pg
    # What the compiler cannot see: neighbours that begin at a multiple of their number.
    if RUN > 1:
        lines = tl.multiple_of(lines, RUN)
        if ALONG:
            lines = tl.max_contiguous(lines, RUN)
            columns = tl.multiple_of(columns, RUN)
    return tl.load(p_ptr + columns[:, None] + lines[None, :], mask=mask, other=0.0)


@triton.jit
def _reduce_kernel(
    p0_ptr,
    p1_ptr,
    p2_ptr,
    p3_ptr,
    q_ptr,
    p_scale_ptr,
    sums_ptr,
    out_ptr,
    scale,
    scale_ptr,
    rows,
    steps,
    stride_pm,
    stride_pg,
    stride_pp,
    stride_qm,
    stride_qg,
    stride_qq,
    stride_sg,
    stride_sp,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    ALONG_P: tl.constexpr,
    RUN_P: tl.constexpr,
    ALONG_Q: tl.constexpr,
    RUN_Q: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    tiles = q_blocks * tl.cdiv(COUNT * P, BLOCK_P)
    pid = tl.program_id(0)
    # The tiles of one split are neighbours: they read the same rows.
    pid_split = pid // tiles
    offs_p = (pid % tiles) // q_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_q = (pid % tiles) % q_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    slot = offs_p // P
    begin = pid_split.to(tl.int64) * steps * BLOCK_R
    acc = tl.zeros([BLOCK_P, BLOCK_Q], dtype=tl.float32)
    sums = tl.zeros([BLOCK_P], dtype=tl.float32)
    for step in range(steps):
        first = begin + step * BLOCK_R
        row_mask = first + tl.arange(0, BLOCK_R) < rows
        m, g = split_rows(first, GROUP, BLOCK_R)
        g = g.to(tl.int64)
        p_mask = (offs_p < P)[:, None] & row_mask[None, :]
        p_tile = _load_rows(p0_ptr, offs_p, p_mask, m, g, stride_pm, stride_pg, stride_pp, ALONG_P, RUN_P)
        # Each column has one operand; the others' tiles are 0 there, so that their sum is exact.
        if p1_ptr is not None:
            mask = (slot == 1)[:, None] & row_mask[None, :]
            p_tile += _load_rows(
                p1_ptr, offs_p - P, mask, m, g, stride_pm, stride_pg, stride_pp, ALONG_P, RUN_P
            )
        if p2_ptr is not None:
            mask = (slot == 2)[:, None] & row_mask[None, :]
            p_tile += _load_rows(
                p2_ptr, offs_p - 2 * P, mask, m, g, stride_pm, stride_pg, stride_pp, ALONG_P, RUN_P
            )
        if p3_ptr is not None:
            mask = (slot == 3)[:, None] & row_mask[None, :]
            p_tile += _load_rows(
                p3_ptr, offs_p - 3 * P, mask, m, g, stride_pm, stride_pg, stride_pp, ALONG_P, RUN_P
            )
        if p_scale_ptr is not None:
            scale_offsets = offs_p[:, None].to(tl.int64) * stride_sp + g[None, :] * stride_sg
            p_scale = tl.load(p_scale_ptr + scale_offsets, mask=p_mask, other=0.0).to(tl.float32)
            # Rounding point 0: the scaled operand is rounded as p itself was.
            p_tile = (p_tile.to(tl.float32) * p_scale).to(p_tile.dtype)
        q_mask = (offs_q < Q)[:, None] & row_mask[None, :]
        q_tile = _load_rows(q_ptr, offs_q, q_mask, m, g, stride_qm, stride_qg, stride_qq, ALONG_Q, RUN_Q).T
        if sums_ptr is not None:
            sums += tl.sum(p_tile.to(tl.float32), 1)
        # Rounding point 0 of operands that differ: the wider becomes the other's dtype.
        if p_tile.dtype.primitive_bitwidth > q_tile.dtype.primitive_bitwidth:
            p_tile = p_tile.to(q_tile.dtype)
        q_tile = q_tile.to(p_tile.dtype)
        acc = dot(p_tile, q_tile, acc, PRECISION)
    if SPLIT == 1 and COUNT == 1:
        acc = acc * scale_value(scale, scale_ptr)
        sums = sums * scale_value(scale, scale_ptr)
    if sums_ptr is not None and (pid % tiles) % q_blocks == 0:
        sums_offsets = pid_split.to(tl.int64) * P + offs_p
        tl.store(sums_ptr + sums_offsets, sums.to(sums_ptr.dtype.element_ty), mask=offs_p < P)
    # Rounding point: none into fp32 partial sums, once into the factor's dtype.
    line = (slot * SPLIT + pid_split).to(tl.int64) * P + offs_p % P
    tl.store(
        out_ptr + line[:, None] * Q + offs_q[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(slot < COUNT)[:, None] & (offs_q < Q)[None, :],
    )


SLOTS = 4
"""Left operands that share one read of the right one."""


def reduce_rows(
    p: Tensor,
    q: Tensor,
    scale: float | Tensor,
    dtype: torch.dtype,
    p_scale: Tensor | None = None,
    sums: Tensor | None = None,
    config: reduction_tuning.ReduceConfig | None = None,
    stages: SecondStages | None = None,
) -> Tensor:
    """(P, Q) = scale · Σ_{m,g} (p_scale[g] ⊙ p[m, g])ᵀ q[m, g], the same bits at every call.

    p:       (M, G, P)  in any strides
    q:       (M, G, Q)  in any strides
    p_scale: (G, P)     in any strides
    sums:    (P,)       gets scale · Σ_{m,g} p_scale[g] ⊙ p[m, g]; contiguous, any dtype
    config:  None for the one that `tuning` chooses
    stages:  what finishes the results; None: they are finished here
    """
    out = new_output(p, (p.shape[2], q.shape[2]), dtype)
    own = SecondStages() if stages is None else stages
    _reduce([p], q, scale, [out], p_scale, sums, config, own)
    if stages is None:
        own.finish()
    return out


def reduce_shared_rows(
    ps: Sequence[Tensor],
    q: Tensor,
    dtypes: Sequence[torch.dtype],
    stages: SecondStages,
    config: reduction_tuning.ReduceConfig | None = None,
) -> list[Tensor]:
    """Σ_{m,g} p[m, g]ᵀ q[m, g] of up to SLOTS p (M, G, P) of one shape and one set of strides, from one read of q.

    stages: what finishes the results
    """
    assert len(ps) <= SLOTS
    outs = [new_output(p, (p.shape[2], q.shape[2]), dtype) for p, dtype in zip(ps, dtypes, strict=True)]
    _reduce(ps, q, 1.0, outs, None, None, config, stages)
    return outs


def _reduce(
    ps: Sequence[Tensor],
    q: Tensor,
    scale: float | Tensor,
    outs: Sequence[Tensor],
    p_scale: Tensor | None,
    sums: Tensor | None,
    config: reduction_tuning.ReduceConfig | None,
    stages: SecondStages,
) -> None:
    p, count = ps[0], len(ps)
    tokens, group, height = p.shape
    width, rows = q.shape[2], tokens * group
    wider = p.dtype if p.dtype.itemsize >= q.dtype.itemsize else q.dtype
    config = config or reduction_tuning.reduce_choice(
        architecture_of(p.device), wider, rows, count * height, width
    )
    target, sums_target = outs[0], sums
    if config.split > 1 or count > 1:
        target = new_output(p, (count, config.split, height, width), torch.float32)
    if config.split > 1 and sums is not None:
        sums_target = new_output(p, (config.split, height), torch.float32)
    (along_p, run_p), (along_q, run_q) = row_runs(p), row_runs(q)
    arguments = {
        **slot_arguments("p{}_ptr", ps, SLOTS),
        "q_ptr": q,
        "p_scale_ptr": p_scale,
        "sums_ptr": sums_target,
        "out_ptr": target,
        **scale_arguments(scale),
        "rows": rows,
        "steps": tuning.blocks(tuning.blocks(rows, config.block_r), config.split),
        "stride_pm": p.stride(0),
        "stride_pg": p.stride(1),
        "stride_pp": p.stride(2),
        "stride_qm": q.stride(0),
        "stride_qg": q.stride(1),
        "stride_qq": q.stride(2),
        "stride_sg": 0 if p_scale is None else p_scale.stride(0),
        "stride_sp": 0 if p_scale is None else p_scale.stride(1),
    }
    constants = {
        "COUNT": count,
        "GROUP": group,
        "P": height,
        "Q": width,
        "ALONG_P": along_p,
        "RUN_P": run_p,
        "ALONG_Q": along_q,
        "RUN_Q": run_q,
        "SPLIT": config.split,
        "PRECISION": dot_precision(p.dtype),
        "BLOCK_R": config.block_r,
        "BLOCK_P": config.block_p,
        "BLOCK_Q": config.block_q,
    }
    programs = (
        tuning.blocks(count * height, config.block_p) * tuning.blocks(width, config.block_q) * config.split
    )
    launch(_reduce_kernel, programs, p.device, arguments, constants, config.warps, config.stages)
    if target is not outs[0]:
        for out, partial in zip(outs, target.unbind(), strict=True):
            stages.add(partial, out, scale)
    if sums is not None and sums_target is not None and sums_target is not sums:
        stages.add(sums_target, sums, scale)
