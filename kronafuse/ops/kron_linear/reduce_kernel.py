"""Factor gradients: Σ over tokens and groups of p[m, g, :]ᵀ q[m, g, :], in two stages without atomics."""

from __future__ import annotations

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
def _reduce_kernel(
    p_ptr,
    q_ptr,
    p_scale_ptr,
    sums_ptr,
    out_ptr,
    scale,
    scale_ptr,
    rows,
    P,
    Q,
    steps,
    stride_pm,
    stride_pg,
    stride_pp,
    stride_qm,
    stride_qg,
    stride_qq,
    stride_sg,
    stride_sp,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    tiles = q_blocks * tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0)
    # The tiles of one split are neighbours: they read the same rows.
    pid_split = pid // tiles
    offs_p = (pid % tiles) // q_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_q = (pid % tiles) % q_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_columns = p_ptr + offs_p.to(tl.int64) * stride_pp
    q_columns = q_ptr + offs_q.to(tl.int64) * stride_qq
    begin = pid_split.to(tl.int64) * steps * BLOCK_R
    acc = tl.zeros([BLOCK_P, BLOCK_Q], dtype=tl.float32)
    sums = tl.zeros([BLOCK_P], dtype=tl.float32)
    for step in range(steps):
        first = begin + step * BLOCK_R
        row_mask = first + tl.arange(0, BLOCK_R) < rows
        m, g = split_rows(first, GROUP, BLOCK_R)
        g = g.to(tl.int64)
        p_mask = (offs_p < P)[:, None] & row_mask[None, :]
        p_tile = tl.load(
            p_columns[:, None] + (m * stride_pm + g * stride_pg)[None, :], mask=p_mask, other=0.0
        )
        if p_scale_ptr is not None:
            scale_offsets = offs_p[:, None].to(tl.int64) * stride_sp + g[None, :] * stride_sg
            p_scale = tl.load(p_scale_ptr + scale_offsets, mask=p_mask, other=0.0).to(tl.float32)
            # Rounding point 0: the scaled operand is rounded as p itself was.
            p_tile = (p_tile.to(tl.float32) * p_scale).to(p_tile.dtype)
        q_mask = (offs_q < Q)[None, :] & row_mask[:, None]
        q_tile = tl.load(
            q_columns[None, :] + (m * stride_qm + g * stride_qg)[:, None], mask=q_mask, other=0.0
        )
        if sums_ptr is not None:
            sums += tl.sum(p_tile.to(tl.float32), 1)
        # Rounding point 0 of operands that differ: the wider becomes the other's dtype.
        if p_tile.dtype.primitive_bitwidth > q_tile.dtype.primitive_bitwidth:
            p_tile = p_tile.to(q_tile.dtype)
        q_tile = q_tile.to(p_tile.dtype)
        acc = dot(p_tile, q_tile, acc, PRECISION)
    if SPLIT == 1:
        acc = acc * scale_value(scale, scale_ptr)
        sums = sums * scale_value(scale, scale_ptr)
    if sums_ptr is not None and (pid % tiles) % q_blocks == 0:
        sums_offsets = pid_split.to(tl.int64) * P + offs_p
        tl.store(sums_ptr + sums_offsets, sums.to(sums_ptr.dtype.element_ty), mask=offs_p < P)
    # Rounding point: none into fp32 partial sums, once into the factor's dtype.
    offsets = (pid_split.to(tl.int64) * P + offs_p)[:, None] * Q + offs_q[None, :]
    tl.store(
        out_ptr + offsets,
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_p < P)[:, None] & (offs_q < Q)[None, :],
    )


def reduce_rows(
    p: Tensor,
    q: Tensor,
    scale: float | Tensor,
    dtype: torch.dtype,
    p_scale: Tensor | None = None,
    sums: Tensor | None = None,
    config: tuning.ReduceConfig | None = None,
) -> Tensor:
    """(P, Q) = scale · Σ_{m,g} (p_scale[g] ⊙ p[m, g])ᵀ q[m, g], the same bits at every call.

    p:       (M, G, P)  in any strides
    q:       (M, G, Q)  in any strides
    p_scale: (G, P)     in any strides
    sums:    (P,)       gets scale · Σ_{m,g} p_scale[g] ⊙ p[m, g]; contiguous, any dtype
    config:  None for the one that `tuning` chooses
    """
    tokens, group, height = p.shape
    width, rows = q.shape[2], tokens * group
    out = new_output(p, (height, width), dtype)
    wider = p.dtype if p.dtype.itemsize >= q.dtype.itemsize else q.dtype
    config = config or tuning.reduce_config(wider, rows, height, width)
    target, sums_target = out, sums
    if config.split > 1:
        target = new_output(p, (config.split, height, width), torch.float32)
        if sums is not None:
            sums_target = new_output(p, (config.split, 1, height), torch.float32)
    arguments = {
        "p_ptr": p,
        "q_ptr": q,
        "p_scale_ptr": p_scale,
        "sums_ptr": sums_target,
        "out_ptr": target,
        **scale_arguments(scale),
        "rows": rows,
        "P": height,
        "Q": width,
        "steps": triton.cdiv(triton.cdiv(rows, config.block_r), config.split),
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
        "GROUP": group,
        "SPLIT": config.split,
        "PRECISION": dot_precision(p.dtype),
        "BLOCK_R": config.block_r,
        "BLOCK_P": config.block_p,
        "BLOCK_Q": config.block_q,
    }
    programs = triton.cdiv(height, config.block_p) * triton.cdiv(width, config.block_q) * config.split
    launch(_reduce_kernel, programs, p.device, arguments, constants, config.warps, config.stages)
    if config.split > 1:
        sum_partials(target, out, 0, scale)
        if sums is not None and sums_target is not None:
            sum_partials(sums_target, sums.view(1, height), 0, scale)
    return out
