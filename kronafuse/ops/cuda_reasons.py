"""What rules the CUDA C++ kernels out for a call."""

from __future__ import annotations

import torch

from .. import native

DTYPES = (torch.float16, torch.bfloat16)
UNMEASURED = "no GPU has measured the kernels yet: impl='cuda' runs them, and auto passes them by"


def reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Empty where the CUDA kernels can serve tensors of this device and dtype."""
    found = native.cuda_reasons(device)
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found.append(f"{name} tensors: the kernels take float16 and bfloat16")
    return found
