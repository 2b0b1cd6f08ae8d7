"""T = scale · A P per token: the down map A ⊗ I, and the step between the factors of a low-rank B."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..outputs import new_output
from ..triton_common import dot, dot_precision, scale_arguments, scale_value, split_rows
from . import tuning


@triton.jit
def _mix_kernel(
    p_ptr,
    a_ptr,
    in_scale_ptr,
    out_ptr,
    scale,
    scale_ptr,
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
    R: tl.constexpr,
    EVEN_I: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    out_blocks = tl.cdiv(O1, BLOCK_O)
    pid = tl.program_id(0)
    # Programs of one token block are neighbours, so that P comes from cache after the first.
    offs_o = (pid % out_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    first = (pid // out_blocks).to(tl.int64) * BLOCK_J
    j_mask = first + tl.arange(0, BLOCK_J) < elements
    m, r = split_rows(first, R, BLOCK_J)
    r = r.to(tl.int64)
    p_columns = p_ptr + m * stride_pm + r * stride_pr
    acc = tl.zeros([BLOCK_O, BLOCK_J], dtype=tl.float32)
    for i in range(0, I1, BLOCK_I):
        offs_i = i + tl.arange(0, BLOCK_I)
        a_mask = (offs_o < O1)[:, None]
        p_mask = j_mask[None, :]
        if not EVEN_I:
            a_mask = a_mask & (offs_i < I1)[None, :]
            p_mask = p_mask & (offs_i < I1)[:, None]
        wide_i = offs_i.to(tl.int64)
        a_offsets = offs_o[:, None].to(tl.int64) * stride_ao + wide_i[None, :] * stride_ai
        a_tile = tl.load(a_ptr + a_offsets, mask=a_mask, other=0.0)  # [BLOCK_O, BLOCK_I]
        p_tile = tl.load(
            p_columns[None, :] + wide_i[:, None] * stride_pi, mask=p_mask, other=0.0
        )  # [BLOCK_I, BLOCK_J]
        if in_scale_ptr is not None:
            scale_offsets = wide_i[:, None] * stride_si + r[None, :] * stride_sr
            in_scale = tl.load(in_scale_ptr + scale_offsets, mask=p_mask, other=0.0).to(tl.float32)
            # Rounding point 0: the scaled input is rounded as x itself was.
            p_tile = (p_tile.to(tl.float32) * in_scale).to(p_tile.dtype)
        acc = dot(a_tile, p_tile, acc, PRECISION)
    # Rounding point 1: T contains the scale.
    value = (acc * scale_value(scale, scale_ptr)).to(out_ptr.dtype.element_ty)
    out_offsets = (m * O1 * R + r)[None, :] + offs_o[:, None].to(tl.int64) * R
    tl.store(out_ptr + out_offsets, value, mask=(offs_o < O1)[:, None] & j_mask[None, :])


def mix_tokens(
    view: Tensor,
    a: Tensor,
    scale: float | Tensor,
    in_scale: Tensor | None = None,
    config: tuning.MixConfig | None = None,
) -> Tensor:
    """(M, O1, R) = scale · A (in_scale ⊙ p[m]) for every token.

    view:     (M, I1, R)  p, in any strides
    a:        (O1, I1)    in any strides
    in_scale: (I1, R)    multiplies p
    """
    tokens, features, columns = view.shape
    out = new_output(view, (tokens, a.shape[0], columns))
    elements = tokens * columns
    if elements == 0:
        return out
    config = config or tuning.mix_config(view.dtype, a.shape[0], features)
    arguments = {
        "p_ptr": view,
        "a_ptr": a,
        "in_scale_ptr": in_scale,
        "out_ptr": out,
        **scale_arguments(scale),
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
        "R": columns,
        "EVEN_I": features % config.block_i == 0,
        "PRECISION": dot_precision(view.dtype),
        "BLOCK_J": config.block_j,
        "BLOCK_O": config.block_o,
        "BLOCK_I": config.block_i,
    }
    programs = triton.cdiv(elements, config.block_j) * triton.cdiv(a.shape[0], config.block_o)
    launch(_mix_kernel, programs, view.device, arguments, constants, config.warps, config.stages)
    return out
