"""What there is to tune: the choices that training steps come to, and the launches that a choice leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import tuned
from ..ops.launch import Architecture, Launch, recording
from ..ops.tuned import Choice
from ..testing.aot_problems import prepare_bottleneck_step, prepare_train_step
from ..testing.bottleneck_cases import BottleneckCase
from ..testing.cases import Case
from .timing import Call
from .tune_candidates import TUNABLES, valid


@dataclass(frozen=True)
class Subject:
    """A training step whose launches are tuned: a case with its tokens in all, and the layers that share x.

    factor_dtype: of a Kronecker adapter's parameters; mixed-precision training keeps them in fp32
    """

    case: Case | BottleneckCase
    dtype: torch.dtype
    layers: int = 1
    factor_dtype: torch.dtype = torch.float32

    def prepare(self, device: str) -> Call:
        """The step on random tensors of this device."""
        make = partial(torch.randn, device=device)
        if isinstance(self.case, BottleneckCase):
            return prepare_bottleneck_step(self.case, self.dtype, make)
        return prepare_train_step(
            self.case, self.dtype, make, layers=self.layers, factor_dtype=self.factor_dtype
        )


@dataclass(frozen=True)
class Problem:
    """A choice of a step; `routes` are forced upon the step, so that it comes to this choice."""

    choice: Choice
    subject: Subject
    routes: Mapping[str, Any]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.choice.key.items())
        return f"{self.choice.kernel} {sizes}"

    @property
    def place(self) -> tuple[object, ...]:
        """What the rows of one GPU's table differ in."""
        return (self.choice.kernel, *self.choice.key.values())

    @property
    def is_route(self) -> bool:
        """Whether the whole step is timed."""
        return TUNABLES[self.choice.kernel].route


def route_forms() -> Iterator[dict[str, Any]]:
    """No route forced, then each form of each route."""
    yield {}
    for kernel, tunable in TUNABLES.items():
        if tunable.route:
            yield from ({kernel: tunable.kind(form)} for form in tunable.kind.FORMS)


def problems(
    subjects: Sequence[Subject], architecture: Architecture, kernels: Sequence[str] = ()
) -> list[Problem]:
    """Every choice that the steps come to by any route, each row of the table once.

    Step by step, so that the first ones are whole whatever a budget leaves out: kernels by predicted time, then the
    routes, which are timed with the kernels' configurations.

    kernels: only theirs; empty: all
    """
    found: dict[tuple[object, ...], Problem] = {}
    for subject in subjects:
        step = subject.prepare("meta")
        for routes in route_forms():
            asked: list[Choice] = []

            def decide(choice: Choice, asked: list[Choice] = asked, routes: Any = routes) -> Any:
                asked.append(choice)
                return routes.get(choice.kernel)

            with recording(architecture), tuned.deciding(decide):
                step()
            for choice in asked:
                problem = Problem(choice, subject, routes)
                if not kernels or choice.kernel in kernels:
                    found.setdefault(problem.place, problem)
    # Without candidates the rule serves a problem by other kernels.
    times = {place: min(valid(problem.choice).values(), default=-1.0) for place, problem in found.items()}
    steps = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
    ordered = sorted(
        found, key=lambda place: (steps[found[place].subject], found[place].is_route, -times[place])
    )
    return [found[place] for place in ordered if times[place] >= 0]


def faults(rows: Sequence[tuned.Row], architecture: Architecture) -> list[str]:
    """What is wrong with a table's rows for this GPU: configurations with other fields, or that cannot run."""
    found = []
    for row in rows:
        values = [getattr(torch, each) if name in DTYPE_KEYS else each for name, each in row.key.items()]
        choice, tunable = Choice(row.kernel, architecture, tuple(values)), TUNABLES[row.kernel]
        where = f"{row.kernel} of {row.gpu} {row.key}"
        try:
            tuned.configuration(tunable.kind, row.config, where, *tunable.limits(choice))
        except ValueError as error:
            found.append(str(error))
    return found


DTYPE_KEYS = ("dtype", "widest")
"""Parts of a row's key that name a dtype."""


Known = Mapping[tuple[object, ...], Any]
"""Place of a problem -> the configuration that was measured for it."""


def decider(problem: Problem, config: Any, known: Known, reached: Callable[[], object]) -> tuned.Decide:
    """Forces `config` upon the problem's choice, its routes upon the step, and upon kernels what is known already.

    reached: called where the problem's choice is asked for
    """
    own = problem.choice

    def decide(asked: Choice) -> Any:
        if (asked.kernel, asked.values) == (own.kernel, own.values):
            reached()
            return config
        if TUNABLES[asked.kernel].route:
            return problem.routes.get(asked.kernel)
        return known.get((asked.kernel, *asked.key.values()))

    return decide


def launches_of(problem: Problem, step: Call, config: Any, known: Known | None = None) -> list[Launch]:
    """The launch of this choice with this configuration, then the second stages of its sums."""
    positions: list[int] = []
    with recording(problem.choice.architecture) as launches:
        decide = decider(problem, config, known or {}, lambda: positions.append(len(launches)))
        with tuned.deciding(decide):
            step()
    assert_reached(problem, positions)
    first = launches[positions[0]]
    written = _storages(first)
    return [first] + [
        each
        for each in launches[positions[0] + 1 :]
        if each.kernel.__name__.startswith("_sum") and written & _storages(each)
    ]


def assert_reached(problem: Problem, times: Sequence[object]) -> None:
    if not times:
        raise RuntimeError(f"bench tune: {problem.subject.case} did not ask for {problem} again")


def _storages(launch: Launch) -> set[int]:
    """What tells the memory of its tensors apart, also where they have none."""
    tensors = (value for value in launch.arguments.values() if isinstance(value, Tensor))
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def shortlist(predicted: Mapping[Any, float], most: int) -> list[Any]:
    """The best by prediction; first one of each tile, then what differs from them in stages and order alone."""
    tiles: dict[Any, Any] = {}
    for config in predicted:
        same = {name: 0 for name in ("stages", "group_m") if hasattr(config, name)}
        tiles.setdefault(replace(config, **same), config)
    first = list(tiles.values())[: max(1, most - 2)]
    return [*first, *(config for config in predicted if config not in first)][:most]
