"""What rules Triton out for a call; imports no Triton."""

from __future__ import annotations

import torch

from .. import env

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Empty where the Triton kernels can serve tensors of this device and dtype."""
    found = []
    if not env.has_triton():
        found.append("Triton is not installed (it exists for Linux: pip install triton)")
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found.append(f"{name} tensors: the kernels take float32, float16 and bfloat16")
    if env.triton_interprets():
        if dtype == torch.bfloat16:
            found.append(f"Triton's interpreter ({env.TRITON_INTERPRET}=1) computes bfloat16 wrongly")
        problem = env.interpreter_problem()
        if problem is not None:
            found.append(problem)
    elif device.type != "cuda":
        found.append(
            f"no CUDA device: tensors are on {device} (or set {env.TRITON_INTERPRET}=1 to interpret)"
        )
    elif torch.version.hip is None and env.cuda_capability(device.index or 0) < (8, 0):
        major, minor = env.cuda_capability(device.index or 0)
        found.append(f"{device} is sm_{major}{minor}: the kernels need sm_80 or later")
    return found
