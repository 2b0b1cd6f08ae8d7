"""What an arm is: a named way to compute a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..problems import Problem, Spec


@dataclass(frozen=True)
class Built:
    """An arm on the tensors of one problem.

    forward: gives the outputs
    leaves:  name -> tensor whose gradient a training step asks for, x first; named as in `testing.accuracy.tensors_of`
    own:     the problem that it computes, where that is not the one it was built on
    """

    forward: Callable[[], Sequence[Tensor]]
    leaves: Mapping[str, Tensor]
    own: Problem | None = None


def no_reason(_spec: Spec) -> list[str]:
    """Serves everything."""
    return []


@dataclass(frozen=True)
class Arm:
    """A baseline, or one of our implementations.

    reasons:  why it does not cover a Spec; empty where it does
    build:    the arm on a problem; called once for each copy of the tensors
    impl:     ours by implementation; None for baselines
    adapted:  False for the frozen layer alone
    evidence: beginnings of names of ops or kernels; the profiler must see one, or what was named did not run
    """

    name: str
    build: Callable[[Any], Built]
    reasons: Callable[[Spec], list[str]] = no_reason
    impl: str | None = None
    adapted: bool = True
    evidence: Callable[[], tuple[str, ...]] = field(default=lambda: ())


def leaf(tensor: Tensor, trains: bool, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of its own on the same memory, where the dtype is the same too."""
    value = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    return value.requires_grad_(trains)


def forward_of(built: Built, problem: Problem) -> Callable[[], Sequence[Tensor]]:
    """The outputs; gradients are tracked in a training step."""

    def forward() -> Sequence[Tensor]:
        with torch.set_grad_enabled(problem.spec.trains):
            return built.forward()

    return forward


def step_of(built: Built, problem: Problem) -> Callable[[], Sequence[Tensor]]:
    """One call: the outputs where nothing has a gradient, or the gradients of all leaves."""
    if not problem.spec.trains:
        return forward_of(built, problem)
    leaves, dys = list(built.leaves.values()), list(problem.dys)
    return lambda: torch.autograd.grad(list(built.forward()), leaves, dys)
