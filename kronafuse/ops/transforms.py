"""Errors in our words for the transforms and tracers of torch that are not implemented."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FORWARD = (
    "forward-mode derivatives (torch.func.jvp, jacfwd, linearize, dual tensors) are not implemented; use the reverse "
    "mode: backward, torch.func.grad or vjp"
)
BATCHED = (
    "the batched tensors of torch.func.vmap (also in jacfwd, hessian, jacrev, is_grads_batched) are not implemented; "
    "give x leading dimensions, jacrev a chunk_size of 1, or loop"
)
FUNCTIONALIZED = "torch.func.functionalize is not implemented; use torch.compile, torch.export or make_fx"
TRACED = "torch.jit.trace is not implemented; use torch.export or torch.compile"
TRACED_GRADIENTS = "torch.jit.trace records no gradients; use torch.export or torch.compile"
REASONS = (
    ("jvp function", FORWARD),
    ("vmap", BATCHED),
    ("Batching rule not implemented", BATCHED),
    ("Functionalize rule", FUNCTIONALIZED),
    ("unsupported input list type", TRACED),
)
"""A part of torch's message -> ours. Another message goes on as it is."""


def explained(op: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments); what torch raises for a transform becomes NotImplementedError in our words."""
    if torch.compiler.is_compiling():
        return function(*arguments)
    try:
        return function(*arguments)
    except RuntimeError as error:  # NotImplementedError is one
        _raise_reason(op, error)
        raise


def apply(op: str, function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments) likewise, and not under torch.jit.trace, which would keep a call into Python."""
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise NotImplementedError(f"{op}: {TRACED_GRADIENTS}")
    return explained(op, function.apply, *arguments)


def _raise_reason(op: str, error: RuntimeError) -> None:
    message = str(error)
    if message.startswith(f"{op}:"):
        return
    for sign, reason in REASONS:
        if sign in message:
            raise NotImplementedError(f"{op}: {reason}") from error
