"""What rules the native CPU kernels out for a call; loads the library, and no more."""

from __future__ import annotations

import torch

from .. import native

DTYPES = (torch.float32, torch.bfloat16)


def reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Empty where the CPU kernels can serve tensors of this device and dtype."""
    if device.type != "cpu":
        return [f"its kernels run on the CPU, and the tensors are on {device}"]
    found = native.cpu_reasons()
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found.append(f"{name} tensors: the kernels take float32 and bfloat16")
    return found
