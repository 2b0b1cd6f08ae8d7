"""T = scale · A P per token: the down map A ⊗ I and the step between the factors of a low-rank B; several A at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


@triton.jit
def _own_rows(lines, a_ptr, first, offs_o, stride_ao):
    """`lines`, but the addresses of this A from row `first` on."""
    own = a_ptr + (offs_o - first).to(tl.int64) * stride_ao
    return tl.where(offs_o >= first, own, lines)


@triton.jit
def _store_rows(
    acc, out_ptr, scale, scale_ptr, offs_o, O1, token_offsets, j_mask, R: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """Stores the rows of one A into its T (M, O1, R)."""
    lines = offs_o.to(tl.int64) * R
    if RUN > 1:
        lines = tl.multiple_of(lines, RUN)
    mask = ((offs_o >= 0) & (offs_o < O1))[:, None] & j_mask[None, :]
    # Rounding point 1: T contains the scale.
    value = (acc * scale_value(scale, scale_ptr)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + lines[:, None] + token_offsets[None, :], value, mask=mask)


@triton.jit
def _mix_kernel(
    p_ptr,
    in_scale_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    a3_ptr,
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
    elements,
    O1,
    I1,
    stride_pm,
    stride_pi,
    stride_pr,
    stride_ao,
    stride_ai,
    stride_si,
    stride_sr,
    COUNT: tl.constexpr,
    R: tl.constexpr,
    RUN: tl.constexpr,
    EVEN_I: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    out_blocks = tl.cdiv(COUNT * O1, BLOCK_O)
    pid = tl.program_id(0)
    # Programs of one token block are neighbours, so that P comes from cache after the first.
    offs_o = (pid % out_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    first = (pid // out_blocks).to(tl.int64) * BLOCK_J
    j_mask = first + tl.arange(0, BLOCK_J) < elements
    m, r = split_rows(first, R, BLOCK_J)
    r = r.to(tl.int64)
    p_offsets = m * stride_pm + r * stride_pr
    if RUN > 1:
        p_offsets = tl.max_contiguous(tl.multiple_of(p_offsets, RUN), RUN)
    # Each row has one A: its address is chosen once, so that one tile of the factors is loaded, not one an A.
    a_lines = a0_ptr + offs_o.to(tl.int64) * stride_ao
    if a1_ptr is not None:
        a_lines = _own_rows(a_lines, a1_ptr, O1, offs_o, stride_ao)
    if a2_ptr is not None:
        a_lines = _own_rows(a_lines, a2_ptr, 2 * O1, offs_o, stride_ao)
    if a3_ptr is not None:
        a_lines = _own_rows(a_lines, a3_ptr, 3 * O1, offs_o, stride_ao)
    acc = tl.zeros([BLOCK_O, BLOCK_J], dtype=tl.float32)
    for i in range(0, I1, BLOCK_I):
        offs_i = i + tl.arange(0, BLOCK_I)
        a_mask = (offs_o < COUNT * O1)[:, None] & (offs_i < I1)[None, :]
        p_mask = j_mask[None, :]
        if not EVEN_I:
            p_mask = p_mask & (offs_i < I1)[:, None]
        wide_i = offs_i.to(tl.int64)
        lines = wide_i * stride_pi
        if RUN > 1:
            lines = tl.multiple_of(lines, RUN)
        p_tile = tl.load(p_ptr + lines[:, None] + p_offsets[None, :], mask=p_mask, other=0.0)
        if in_scale_ptr is not None:
            scale_offsets = wide_i[:, None] * stride_si + r[None, :] * stride_sr
            in_scale = tl.load(in_scale_ptr + scale_offsets, mask=p_mask, other=0.0).to(tl.float32)
            # Rounding point 0: the scaled input is rounded as x itself was.
            p_tile = (p_tile.to(tl.float32) * in_scale).to(p_tile.dtype)
        a_tile = tl.load(a_lines[:, None] + wide_i[None, :] * stride_ai, mask=a_mask, other=0.0)
        # Rounding point 0: a factor of another dtype.
        acc = dot(a_tile.to(p_tile.dtype), p_tile, acc, PRECISION)
    offsets = m * O1 * R + r
    if RUN > 1:
        offsets = tl.max_contiguous(tl.multiple_of(offsets, RUN), RUN)
    _store_rows(acc, out0_ptr, scale0, scale0_ptr, offs_o, O1, offsets, j_mask, R, RUN)
    if a1_ptr is not None:
        _store_rows(acc, out1_ptr, scale1, scale1_ptr, offs_o - O1, O1, offsets, j_mask, R, RUN)
    if a2_ptr is not None:
        _store_rows(acc, out2_ptr, scale2, scale2_ptr, offs_o - 2 * O1, O1, offsets, j_mask, R, RUN)
    if a3_ptr is not None:
        _store_rows(acc, out3_ptr, scale3, scale3_ptr, offs_o - 3 * O1, O1, offsets, j_mask, R, RUN)


SLOTS = 4
"""Left factors that share one read of P."""


class Left(NamedTuple):
    """A (O1, I1), in any strides, and the scale of its products."""

    a: Tensor
    scale: float | Tensor


def mix_tokens(
    view: Tensor,
    lefts: Sequence[Left],
    in_scale: Tensor | None = None,
    config: reduction_tuning.MixConfig | None = None,
) -> list[Tensor]:
    """(M, O1, R) = scale · A (in_scale ⊙ p[m]) for every token and every left factor, from one read of p.

    view:     (M, I1, R)  p, in any strides
    lefts:    up to SLOTS of one shape, one set of strides and one dtype
    in_scale: (I1, R)     multiplies p
    """
    assert len(lefts) <= SLOTS
    assert all(each.a.dtype == lefts[0].a.dtype for each in lefts)
    tokens, features, columns = view.shape
    a, count = lefts[0].a, len(lefts)
    outputs = [new_output(view, (tokens, a.shape[0], columns)) for _ in lefts]
    elements = tokens * columns
    if elements == 0:
        return outputs
    config = config or reduction_tuning.mix_choice(
        architecture_of(view.device), view.dtype, elements, count * a.shape[0], features
    )
    arguments = {
        "p_ptr": view,
        "in_scale_ptr": in_scale,
        **slot_arguments("a{}_ptr", [each.a for each in lefts], SLOTS),
        **slot_arguments("out{}_ptr", outputs, SLOTS),
        **slot_scales([each.scale for each in lefts], SLOTS),
        "elements": elements,
        "O1": a.shape[0],
        "I1": features,
        "stride_pm": view.stride(0),
        "stride_pi": view.stride(1),
        "stride_pr": view.stride(2),
        "stride_ao": a.stride(0),
        "stride_ai": a.stride(1),
        "stride_si": 0 if in_scale is None else in_scale.stride(0),
        "stride_sr": 0 if in_scale is None else in_scale.stride(1),
    }
    constants = {
        "COUNT": count,
        "R": columns,
        "RUN": aligned_run(view.stride(2), columns, view.stride(0), view.stride(1)),
        "EVEN_I": features % config.block_i == 0,
        "PRECISION": dot_precision(view.dtype),
        "BLOCK_J": config.block_j,
        "BLOCK_O": config.block_o,
        "BLOCK_I": config.block_i,
    }
    programs = tuning.blocks(elements, config.block_j) * tuning.blocks(count * a.shape[0], config.block_o)
    launch(_mix_kernel, programs, view.device, arguments, constants, config.warps, config.stages)
    return outputs
