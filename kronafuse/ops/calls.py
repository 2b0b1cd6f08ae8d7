"""What every op does around its kernels: the compute dtype, scales, flat tokens, arguments that Dynamo takes."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..torch_private import (
    below_autograd,
    in_forward_mode,
    is_traced,
    is_unobserved,
    may_autocast,
    may_be_differentiated,
    without_views,
)
from .flop_counting import give_formulas

_NOTHING = nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device and casts x's dtype."""
    if not may_autocast():
        return False
    kind = x.device.type
    eligible = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return eligible and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer runs on x here: autocast's, or x's own."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off inside a kernel: the public function has fixed the compute dtype."""
    if may_autocast() and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; itself where it has it, without the call into torch that `Tensor.to` is."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def scale_dtype(x: Tensor) -> torch.dtype:
    """What a float scale becomes under torch.compile, where a constant would recompile for every value."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def flat_tokens(tensor: Tensor) -> Tensor:
    """(..., K) as (M, K); a view wherever the leading dimensions have one stride."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def unflat_tokens(y: Tensor, tokens: Sequence[int]) -> Tensor:
    """(M, N), which nothing else refers to, as (*tokens, N)."""
    if without_views is None:
        return y.view(*tokens, y.shape[-1]).clone()
    with without_views():
        return y.view(*tokens, y.shape[-1])


def any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether any of the tensors that are there asks for a gradient."""
    return any(each is not None and each.requires_grad for each in tensors)


def runs_directly(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call needs no autograd.Function around its raw op: nothing is differentiated, in any mode.

    torch.func's transforms of the tensors and forward-mode derivatives go through the Function with gradients off
    too, which raises for the forward mode; the raw op alone would give it a derivative of 0. torch.jit.trace records
    the raw op.
    """
    if torch.compiler.is_compiling():
        # Where nothing has a gradient Dynamo hands ctx to a Function's forward, although it has a setup_context.
        return not torch.is_grad_enabled() or not any_requires_grad(tensors)
    if torch.is_grad_enabled():
        return is_traced() and not any_requires_grad(tensors)
    return not in_forward_mode() and not any(
        each is not None and may_be_differentiated(each) for each in tensors
    )


def run_op(
    op: Callable[..., Any], kernel: Callable[..., Any], tensors: Sequence[Tensor | None], *rest: Any
) -> Any:
    """op(*rest), past the dispatcher where nothing but the time differs; `tensors` are those in `rest`."""
    if not is_unobserved(tensors):
        give_formulas()
        return op(*rest)
    with below_autograd():
        return kernel(*rest)


def distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors with a view in place of every one met before: Dynamo takes no tensor twice in one Function."""
    kept: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is each for each in kept):
            tensor = tensor.view_as(tensor)
        kept.append(tensor)
    return kept


class _PositionalArguments(inspect.BoundArguments):
    """All arguments of a call, given by position and none left out."""

    def __init__(self, signature: inspect.Signature, given: tuple[Any, ...]) -> None:
        super().__init__(signature, OrderedDict())
        self._given = given

    @property
    def args(self) -> tuple[Any, ...]:
        return self._given

    @property
    def kwargs(self) -> dict[str, Any]:
        return {}

    def apply_defaults(self) -> None:
        pass


class _PositionalSignature(inspect.Signature):
    """A signature that does not look at the arguments bound to it."""

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        return super().bind(*args, **kwargs) if kwargs else _PositionalArguments(self, args)


def bind_by_position(function: type[torch.autograd.Function]) -> None:
    """Spares the Function the binding of its arguments to forward's signature, which torch does at every apply.

    Its forward takes all of them by position, without defaults.
    """
    forward: Any = function.forward
    signature = inspect.signature(forward)
    assert all(each.default is each.empty for each in signature.parameters.values())
    forward.__signature__ = _PositionalSignature(list(signature.parameters.values()))
