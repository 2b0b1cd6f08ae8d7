"""What a T adds to a tile of the GEMM: dense, or by the structure of the up map."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import dot

NO_TAIL = tl.constexpr(0)
"""No structured tail."""
BLOCK_TAIL = tl.constexpr(1)
"""I ⊗ B, by dots over the groups that a tile touches."""
MIX_TAIL = tl.constexpr(2)
"""A ⊗ I, by multiply-adds."""
ELEMENTWISE_TAIL = tl.constexpr(3)
"""I ⊗ B, by multiply-adds."""


@dataclass(frozen=True)
class DenseTail:
    """T (M, width) and its up map L (N, width)."""

    t: Tensor
    up: Tensor


@dataclass(frozen=True)
class StructuredTail:
    """T, contiguous, and one factor of the up map onto (M, O1·O2) features.

    kind:      BLOCK_TAIL or ELEMENTWISE_TAIL: T (M, O1·J), factor B (O2, J); MIX_TAIL: T (M, J·O2), factor A (O1, J)
    out_scale: (O1·O2,)  multiplies the delta's features
    shuffled:  whether feature index is o2·O1 + o1
    """

    kind: int
    t: Tensor
    factor: Tensor
    sides: tuple[int, int]
    out_scale: Tensor | None
    shuffled: bool


@triton.jit
def add_dense_tail(
    acc,
    t_ptr,
    l_ptr,
    m,
    m_mask,
    n,
    n_mask,
    width,
    stride_tm,
    stride_ln,
    stride_lw,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + T Lᵀ: T (M, width), L (N, width)."""
    t_rows = t_ptr + m * stride_tm
    l_rows = l_ptr + n * stride_ln
    for r in range(0, width, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        t_mask = m_mask[:, None]
        l_mask = n_mask[None, :]
        if not EVEN:
            t_mask = t_mask & (offs_r < width)[None, :]
            l_mask = l_mask & (offs_r < width)[:, None]
        t_tile = tl.load(t_rows[:, None] + offs_r[None, :], mask=t_mask, other=0.0)
        l_tile = tl.load(l_rows[None, :] + offs_r[:, None].to(tl.int64) * stride_lw, mask=l_mask, other=0.0)
        acc = dot(t_tile, l_tile.to(t_tile.dtype), acc, PRECISION)
    return acc


@triton.jit
def add_block_tail(
    acc,
    t_ptr,
    b_ptr,
    out_scale_ptr,
    m,
    m_mask,
    n,
    n_mask,
    o1,
    o2,
    first_group,
    last_group,
    J,
    stride_tm,
    stride_bo,
    stride_bj,
    stride_s,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + out_scale ⊙ (I ⊗ B) T: T (M, O1, J), B (O2, J); only the groups that the tile touches."""
    steps = tl.cdiv(J, BLOCK_R)
    t_rows = t_ptr + m * stride_tm
    b_rows = b_ptr + o2.to(tl.int64) * stride_bo
    for step in range((last_group - first_group + 1) * steps):
        group = first_group + step // steps
        offs_j = (step % steps) * BLOCK_R + tl.arange(0, BLOCK_R)
        t_mask = m_mask[:, None] & (offs_j < J)[None, :]
        b_mask = (n_mask & (o1 == group))[None, :] & (offs_j < J)[:, None]
        t_tile = tl.load(t_rows[:, None] + (group * J + offs_j)[None, :], mask=t_mask, other=0.0)
        b_tile = tl.load(b_rows[None, :] + offs_j[:, None].to(tl.int64) * stride_bj, mask=b_mask, other=0.0)
        if out_scale_ptr is not None:
            out_scale = tl.load(out_scale_ptr + n * stride_s, mask=n_mask, other=0.0).to(tl.float32)
            # Rounding point: a row scale enters L before it is rounded.
            b_tile = (b_tile.to(tl.float32) * out_scale[None, :]).to(t_tile.dtype)
        acc = dot(t_tile, b_tile.to(t_tile.dtype), acc, PRECISION)
    return acc


@triton.jit
def add_elementwise_tail(
    acc,
    t_ptr,
    f_ptr,
    out_scale_ptr,
    first_m,
    m_mask,
    n,
    n_mask,
    of,
    column,
    J,
    width,
    stride_tj,
    stride_fo,
    stride_fj,
    stride_s,
    BLOCK_M: tl.constexpr,
):
    """acc + out_scale ⊙ Σ_j F[of(n), j] T[m, column(n) + j·stride_tj], in fp32; T (M, width) contiguous."""
    # One 64-bit base and 32-bit offsets within the tile: a pointer per element would not fit in registers.
    t_base = t_ptr + first_m.to(tl.int64) * width
    offsets = (tl.arange(0, BLOCK_M) * width)[:, None] + column[None, :]
    f_rows = f_ptr + of.to(tl.int64) * stride_fo
    out_scale = tl.full(n.shape, 1.0, tl.float32)
    if out_scale_ptr is not None:
        out_scale = tl.load(out_scale_ptr + n * stride_s, mask=n_mask, other=0.0).to(tl.float32)
    mask = m_mask[:, None] & n_mask[None, :]
    for _ in range(J):
        factor = tl.load(f_rows, mask=n_mask, other=0.0).to(tl.float32) * out_scale
        acc += tl.load(t_base + offsets, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
        t_base += stride_tj
        f_rows += stride_fj
    return acc
