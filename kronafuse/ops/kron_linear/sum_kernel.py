"""out = scale · Σ over the first dimension of fp32 partial sums, in a fixed order: the second stage of every split."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..triton_common import scale_arguments, scale_value

BLOCK = 512
"""Elements a program sums."""


@triton.jit
def _sum_kernel(
    partial_ptr,
    out_ptr,
    scale,
    scale_ptr,
    split,
    width,
    first,
    stride_part,
    stride_row,
    elements,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    parts = partial_ptr + (index // width) * stride_row + first + index % width
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(split):
        acc += tl.load(parts, mask=mask, other=0.0)
        parts += stride_part
    # Rounding point: the whole sum, once.
    tl.store(out_ptr + index, (acc * scale_value(scale, scale_ptr)).to(out_ptr.dtype.element_ty), mask=mask)


def sum_partials(partial: Tensor, out: Tensor, first: int, scale: float | Tensor) -> None:
    """out = scale · Σ_s partial[s, :, first : first + width], out contiguous.

    partial: (splits, rows, W)  fp32, contiguous
    out:     (rows, width)      any dtype
    """
    assert partial.is_contiguous()
    assert out.is_contiguous()
    arguments = {
        "partial_ptr": partial,
        "out_ptr": out,
        **scale_arguments(scale),
        "split": partial.shape[0],
        "width": out.shape[1],
        "first": first,
        "stride_part": partial.stride(0),
        "stride_row": partial.stride(1),
        "elements": out.numel(),
    }
    launch(_sum_kernel, triton.cdiv(out.numel(), BLOCK), out.device, arguments, {"BLOCK": BLOCK}, 4, 1)
