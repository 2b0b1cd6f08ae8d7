"""What a forward and a backward of a case launch: our own kernels, and those that torch adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.kron_linear.algorithm import backward, forward
from ..ops.kron_linear.terms import FrozenLinear, KronTerm
from ..ops.launch import Architecture, Launch, recording
from .cases import Case

WITHOUT_KERNEL = ("empty", "empty_strided", "new_empty")
"""Operators of torch that take memory and launch nothing; views are known by their schemas."""


class RecordedStep(NamedTuple):
    """Launches of our own in one training step, and torch's operators in it that run a kernel."""

    forward: list[Launch]
    forward_torch: list[str]
    backward: list[Launch]
    backward_torch: list[str]


class StepLaunches(NamedTuple):
    """Kernel -> launches of one training step; torch's own operators under their names, as aten.cat."""

    forward: dict[str, int]
    backward: dict[str, int]


class _TorchKernels(TorchDispatchMode):
    """Lists torch's operators that run a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        aliases = [each.alias_info for each in func._schema.returns if each.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        if not is_view and name not in WITHOUT_KERNEL:
            self.names.append(f"aten.{name}")
        return func(*args, **(kwargs or {}))


def recorded_step(
    cases: Sequence[Case],
    architecture: Architecture,
    *,
    dtype: torch.dtype = torch.bfloat16,
    factor_dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> RecordedStep:
    """One step of layers that share x, one per case, with a weight and a bias: dx and every factor's gradient.

    cases: q, k and v, or one
    batch: images; each brings the case's tokens
    """
    from ..ops.kron_linear import kernels

    tokens, shape = batch * cases[0].tokens, cases[0].shape
    x = _meta(tokens, shape.k, dtype=dtype)
    layers = [_layer(case, dtype, factor_dtype) for case in cases]
    with recording(architecture) as of_forward, _TorchKernels() as torch_forward:
        _, saved = forward(x, layers, kernels)
    needs = [True, *(False for _ in range(2 * len(layers)))]
    for layer in layers:
        for term in layer.terms:
            needs += [term.a is not None, True, term.b_down is not None, False, False]
    dys = [_meta(tokens, case.shape.n, dtype=dtype) for case in cases]
    with recording(architecture) as of_backward, _TorchKernels() as torch_backward:
        backward(dys, x, layers, saved, needs, kernels)
    return RecordedStep(of_forward, torch_forward.names, of_backward, torch_backward.names)


def step_launches(cases: Sequence[Case], architecture: Architecture, **options: Any) -> StepLaunches:
    """`recorded_step` in numbers, with its arguments."""
    step = recorded_step(cases, architecture, **options)
    return StepLaunches(
        _counts(step.forward, step.forward_torch), _counts(step.backward, step.backward_torch)
    )


def _counts(launches: Sequence[Launch], torch_names: Sequence[str]) -> dict[str, int]:
    own = (each.kernel.__name__.strip("_").removesuffix("_kernel") for each in launches)
    return dict(Counter([*own, *torch_names]))


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layer(case: Case, dtype: torch.dtype, factor_dtype: torch.dtype) -> FrozenLinear:
    shape = case.shape
    term = KronTerm(
        _meta(shape.n1, shape.k1, dtype=factor_dtype) if case.has_a else None,
        _meta(shape.n2, shape.rank or shape.k2, dtype=factor_dtype),
        None if shape.rank is None else _meta(shape.rank, shape.k2, dtype=factor_dtype),
        0.5,
        case.shuffled,
    )
    return FrozenLinear(_meta(shape.n, shape.k, dtype=dtype), (term,), _meta(shape.n, dtype=dtype))
