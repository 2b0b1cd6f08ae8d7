"""Whether an arm computes what it is timed for, how accurately, and by which kernels; all before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..testing.accuracy import assert_accurate, errors
from .arms.arm import Arm, Built
from .problems import Expected, Problem, expected
from .profiling import profiled
from .records import Accuracy

TRUTH_TOKENS = 512
"""Tokens on which results are compared with float64, spread over all; gradients of the others are zero then."""
OFF = 0.05
"""A baseline whose RMS error is a larger part of the truth's RMS computes something else."""
MOST_KERNELS = 12
"""Names that a row lists."""


class WrongArm(AssertionError):
    """An arm's results are not what the case asks for, or its kernels did not run."""


@dataclass(frozen=True)
class Checked:
    """Accuracy of an arm and of the eager chain on the same inputs."""

    accuracy: Accuracy
    yardstick: Accuracy
    tokens: int


def truth_rows(tokens: int, device: torch.device) -> Tensor:
    """The compared rows: all, or TRUTH_TOKENS of them at even distances, the first and the last included."""
    count = min(TRUTH_TOKENS, tokens)
    return torch.linspace(0, tokens - 1, count, dtype=torch.float64, device=device).round().long()


class Checks:
    """The truths of one problem, each computed once."""

    def __init__(self, problem: Problem) -> None:
        self.rows = truth_rows(problem.spec.tokens, problem.spec.device)
        self.tokens = len(self.rows)
        self.problem = problem.masked(self.rows)
        self.bare = problem.without_base()
        self.trains, self.dtype = problem.spec.trains, problem.spec.dtype

    def check(self, arm: Arm) -> Checked:
        """Raises WrongArm where ours misses the limits of `testing.accuracy`, or a baseline computes something else."""
        built = arm.build(self.problem)
        right = self._expected(self.problem, built)
        found = self._results(built)
        self._judge(arm, found, right, "")
        ours, chain = (_outputs(each, right) for each in (found, right.yardstick))
        if not arm.adapted:
            return Checked(Accuracy(*ours, None, None), Accuracy(*chain, None, None), self.tokens)
        built = arm.build(self.bare)
        right = self._expected(self.bare, built)
        with torch.set_grad_enabled(self.trains):
            ys = built.forward()
        found = self._outputs(ys, " of the delta alone")
        self._judge(arm, found, right, " of the delta alone")
        delta, chain_delta = (_outputs(each, right) for each in (found, right.yardstick))
        return Checked(Accuracy(*ours, *delta), Accuracy(*chain, *chain_delta), self.tokens)

    @cached_property
    def _known(self) -> dict[tuple[bool, tuple[str, ...]], Expected]:
        return {}

    def _expected(self, problem: Problem, built: Built) -> Expected:
        """The truth; of an arm with a problem of its own, for it alone."""
        bare = problem is self.bare
        wanted = tuple(built.leaves) if self.trains and not bare else ()
        if built.own is not None:
            return expected(built.own, wanted, self.rows)
        if (bare, wanted) not in self._known:
            self._known[bare, wanted] = expected(problem, wanted, self.rows)
        return self._known[bare, wanted]

    def _outputs(self, ys: Sequence[Tensor], of: str) -> dict[str, Tensor]:
        """The compared rows of the outputs, which must be finite in all rows."""
        found = {}
        for index, y in enumerate(ys):
            if not y.isfinite().all().item():
                raise WrongArm(f"y{index}{of}: not finite everywhere")
            found[f"y{index}"] = y.detach()[self.rows]
        return found

    def _results(self, built: Built) -> dict[str, Tensor]:
        """Outputs and gradients of the compared rows."""
        with torch.set_grad_enabled(self.trains):
            ys = list(built.forward())
        found = self._outputs(ys, "")
        if self.trains:
            grads = torch.autograd.grad(ys, list(built.leaves.values()), list(self.problem.dys))
            named = {f"d{name}": grad for name, grad in zip(built.leaves, grads, strict=True)}
            others = torch.ones(len(named["dx"]), dtype=torch.bool, device=self.rows.device)
            others[self.rows] = False
            if named["dx"][others].count_nonzero().item():
                raise WrongArm("dx: not zero where dy is zero")
            found |= {**named, "dx": named["dx"][self.rows]}
        return found

    def _judge(self, arm: Arm, found: Mapping[str, Tensor], right: Expected, of: str) -> None:
        for name, value in found.items():
            truth = right.truth[name]
            if value.shape != truth.shape:
                raise WrongArm(f"{name}{of}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
            if arm.impl is not None:
                try:
                    assert_accurate(
                        f"{name}{of}",
                        value,
                        right.yardstick[name],
                        truth,
                        right.noise[name],
                        self.dtype,
                    )
                except AssertionError as error:
                    raise WrongArm(str(error)) from error
                continue
            error, size = errors(value, truth).rms, truth.square().mean().sqrt().item()
            if not error <= OFF * size:  # also for NaN
                raise WrongArm(f"{name}{of}: RMS error {error:.3g} of results whose RMS is {size:.3g}")


def _outputs(found: Mapping[str, Tensor], right: Expected) -> tuple[float, float]:
    """RMS and largest error of all outputs."""
    names = [name for name in found if name.startswith("y") and name[1:].isdecimal()]
    value = torch.cat([found[name].detach().double().cpu() for name in names], dim=-1)
    truth = torch.cat([right.truth[name].cpu() for name in names], dim=-1)
    return tuple(errors(value, truth))  # type: ignore[return-value]


@dataclass(frozen=True)
class Seen:
    """What the profiler saw in one call: operators, kernels of the device, and how many of these were launched."""

    operators: tuple[str, ...]
    kernels: tuple[str, ...]
    launches: int | None = None

    @property
    def listed(self) -> tuple[str, ...]:
        """For a row: kernels where there are any, else operators, the longest first."""
        return (self.kernels or self.operators)[:MOST_KERNELS]

    def lacks(self, evidence: Sequence[str]) -> bool:
        """Whether none of the names that prove the arm was seen."""
        return bool(evidence) and not any(
            name.startswith(sign) for name in (*self.operators, *self.kernels) for sign in evidence
        )


def observe(step: Callable[[], object], device: torch.device) -> Seen:
    """Profiles one call, after one that warms up."""
    step()
    operators, kernels = profiled(step, device)
    launches = sum(kernels.values()) if device.type == "cuda" else None
    return Seen(tuple(operators), tuple(kernels), launches)


def require_evidence(arm: Arm, seen: Seen) -> None:
    """Raises WrongArm unless the profiler saw one of the arm's own kernels or operators."""
    evidence = arm.evidence()
    if seen.lacks(evidence):
        raise WrongArm(
            f"{arm.name} did not run: none of {', '.join(evidence)} among what the profiler saw:"
            f" {', '.join(seen.listed)}"
        )
