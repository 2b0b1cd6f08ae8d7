"""What the Triton kernels of every op share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import env

INTERPRET: tl.constexpr = tl.constexpr(env.triton_interprets())
"""Whether kernels run in the interpreter, which computes products of 16-bit operands wrongly or not at all."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in fp32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def scale_value(scale, scale_ptr):
    """The scale as an fp32 scalar: the tensor's where there is one, else the number."""
    value = scale
    if scale_ptr is not None:
        value = tl.load(scale_ptr).to(tl.float32)
    return value


@triton.jit
def split_rows(first, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first … first + BLOCK - 1 of (m, g) flattened: (m as int64, g as int32), GROUP the size of g."""
    offsets = tl.arange(0, BLOCK)
    if GROUP == 1:
        m = first + offsets
        g = offsets * 0
    else:
        # Only the block's first row needs 64-bit division.
        local = (first % GROUP).to(tl.int32) + offsets
        m = first // GROUP + local // GROUP
        g = local % GROUP
    return m, g


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of fp32 products, as torch.get_float32_matmul_precision() says; 16-bit ones ignore it."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def scale_arguments(scale: float | torch.Tensor) -> dict[str, float | torch.Tensor | None]:
    """`scale` and `scale_ptr` of a kernel: a number at run time, or a tensor that only the kernel reads."""
    if isinstance(scale, torch.Tensor):
        return {"scale": 1.0, "scale_ptr": scale}
    return {"scale": float(scale), "scale_ptr": None}
