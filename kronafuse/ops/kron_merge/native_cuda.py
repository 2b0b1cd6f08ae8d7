"""W + scale · (A ⊗ B) in CUDA C++ (csrc/cuda/kron_merge)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ..outputs import new_output


def reasons(device: torch.device, _dtype: torch.dtype) -> list[str]:
    """Empty where the kernel can serve tensors of this device; it takes every dtype that the op takes."""
    return native.cuda_reasons(device)


def merge(
    weight: Tensor, a: Tensor | None, b: Tensor, b_down: Tensor | None, scale: Tensor, shuffled: bool
) -> Tensor:
    """W + scale · (A ⊗ B), (N, K) contiguous; factors in any strides and dtypes."""
    out = new_output(weight, weight.shape)
    native.cuda(weight.device).merge(weight, a, b, b_down, 1.0, scale, shuffled, out)
    return out
