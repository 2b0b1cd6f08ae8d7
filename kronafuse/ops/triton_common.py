"""What the Triton kernels of every op share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

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
    """`input_precision` of fp32 products, as torch's own matmul on CUDA is allowed; 16-bit ones ignore it."""
    return "tf32" if dtype == torch.float32 and _allows_tf32() else "ieee"


def _allows_tf32() -> bool:
    """Whether the user lets fp32 products be computed in TF32, by torch's setting of either age.

    `torch.get_float32_matmul_precision()` raises once `torch.backends.cuda.matmul.fp32_precision`, or the same for
    all backends, was set, as torch recommends; the newer setting follows the older one where that was set.
    """
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is None:
        return torch.get_float32_matmul_precision() != "highest"
    return newer == "tf32"


@cache
def _slot_names(pattern: str, count: int) -> tuple[str, ...]:
    return tuple(pattern.format(slot) for slot in range(count))


def slot_arguments(
    pattern: str, values: Sequence[object], count: int, absent: object = None
) -> dict[str, object]:
    """Arguments "p0_ptr", "p1_ptr" … of the pattern "p{}_ptr": the values, then `absent` up to `count` of them."""
    return dict(zip(_slot_names(pattern, count), [*values, *[absent] * (count - len(values))], strict=True))


def slot_scales(scales: Sequence[float | torch.Tensor], count: int) -> dict[str, object]:
    """`scale_arguments` of every slot: "scale0" …, then "scale0_ptr" …"""
    tensors = [isinstance(scale, torch.Tensor) for scale in scales]
    numbers = [1.0 if held else float(scale) for scale, held in zip(scales, tensors, strict=True)]
    pointers = [scale if held else None for scale, held in zip(scales, tensors, strict=True)]
    return slot_arguments("scale{}", numbers, count, 0.0) | slot_arguments("scale{}_ptr", pointers, count)


def scale_arguments(scale: float | torch.Tensor) -> dict[str, float | torch.Tensor | None]:
    """`scale` and `scale_ptr` of a kernel: a number at run time, or a tensor that only the kernel reads."""
    if isinstance(scale, torch.Tensor):
        return {"scale": 1.0, "scale_ptr": scale}
    return {"scale": float(scale), "scale_ptr": None}


def row_runs(view: torch.Tensor) -> tuple[bool, int]:
    """Of (M, G, F): whether rows, not features, are neighbours in memory, and their `aligned_run`."""
    stride_m, stride_g, stride_f = view.stride()
    if stride_f == 1 or stride_g != 1:
        return False, aligned_run(stride_f, view.shape[2], stride_m, stride_g)
    return True, aligned_run(1, view.shape[1], stride_m, stride_f)


def aligned_run(stride: int, length: int, *others: int) -> int:
    """Elements that are always neighbours and begin at a multiple of their number, 8 at most: what one load may take.

    stride: between the elements, `length` of them in a row; others: strides of everything else in the address
    """
    if stride != 1:
        return 1
    run = 8
    while any(each % run for each in (length, *others)):
        run //= 2
    return run
