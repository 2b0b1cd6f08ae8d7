"""When a frozen layer may be read by our kernels instead of being called.

A kernel that reads `base.weight` skips everything a call of `base` would do: hooks that move or cast the
weight, parametrizations, a subclass's own forward, an adapter on top. So it is done only where a call of
`base` is `F.linear(x, base.weight, base.bias)` and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.calls import compute_dtype
from ..torch_private import has_global_hooks

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Of weights that the kernels read."""


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its class's forward."""
    attributes = module.__dict__
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def module_reason(base: nn.Module) -> str | None:
    """Why `base` cannot be fused whatever the input, or None."""
    kind = type(base)
    if kind is not nn.Linear:
        name = kind.__qualname__ if kind.__qualname__ != "Linear" else f"{kind.__module__}.Linear"
        return f"the base is {name}, not nn.Linear"
    if has_hooks(base):
        return "the base's forward is replaced" if "forward" in base.__dict__ else "the base has hooks"
    if has_global_hooks():
        return "hooks are registered on all modules"
    parameters = base._parameters
    if parameters.get("weight") is None or len(parameters) != 2:
        return "the base's weight is not its own parameter"
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return f"the base's {name} is {type(tensor).__name__}, not a plain tensor"
        if tensor.dtype not in DTYPES:
            return f"the base's {name} is {_name(tensor.dtype)}"
    return None


def input_reason(base: nn.Linear, x: Tensor) -> str | None:
    """Why a fusable `base` cannot be fused for this x, or None."""
    dtype, device = compute_dtype(x), x.device
    for name, tensor in base._parameters.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            return f"the base's {name} is {_name(tensor.dtype)}, the compute dtype {_name(dtype)}"
        if tensor.device != device:
            return f"the base's {name} is on {tensor.device}, x on {device}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
