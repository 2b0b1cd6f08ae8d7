"""The activations and their derivatives in plain torch, for the reference and the eager implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

aten = torch.ops.aten

FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda pre: pre,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}
"""Activation -> h = act(pre)."""

BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda dh, pre: dh,
    "relu": lambda dh, pre: aten.threshold_backward(dh, pre, 0),
    "sigmoid": lambda dh, pre: aten.sigmoid_backward(dh, torch.sigmoid(pre)),
    "silu": lambda dh, pre: aten.silu_backward(dh, pre),
    "gelu": lambda dh, pre: aten.gelu_backward(dh, pre),
}
"""Activation -> dpre = dh ⊙ act'(pre)."""
