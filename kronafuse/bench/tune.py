"""Times the configurations of every kernel launch of a case on this GPU, and writes the table of the best.

What is timed is what runs: a case's training step is recorded with a configuration forced upon one of its choices, and
the launch that it leads to is replayed alone, with the second stage of its sum where it has one. Routes, which choose
between kernels, are timed by the whole step, with the configurations just found. Warm: a launch finds in the L2 what
fits there, as it does behind the launch that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..formats.atomic import written_beside
from ..ops import tuned
from ..ops.launch import OPTIONS, Architecture, Launch
from ..ops.tuned import Row
from .device import is_fatal
from .machine import Machine, describe
from .records import Spread
from .timing import Call, Calls
from .tune_candidates import valid
from .tune_problems import Known, Problem, assert_reached, decider, launches_of, shortlist

MOST_CANDIDATES = 6
"""Configurations of one choice that are timed: those of the least predicted time."""
LEAST_SECONDS = 0.2
"""What the timing of one choice takes at least, its compilations aside."""
SKIPPED = "Not reached: "
"""Begins the line of each choice that the budget did not reach."""
NOTE = "Written by `kronafuse bench tune`; rows are read by kronafuse/ops/tuned.py."


class GraphTimer(Protocol):
    """What tuning asks of `timing.CudaTimer`."""

    clock: Callable[[], float]

    def warm_up(self, copies: Sequence[Call]) -> None:
        """Runs every copy."""
        ...

    def device_times(
        self, arms: Calls, seconds: float
    ) -> tuple[dict[str, Spread], dict[str, tuple[str, ...]]]:
        """Device time of each arm in turns, and notes."""
        ...


def replay(launches: Sequence[Launch]) -> None:
    """Runs what was recorded, on the tensors that it was recorded with."""
    for each in launches:
        each.kernel[(each.programs,)](
            **each.arguments, **each.constants, num_warps=each.warps, num_stages=each.stages, **OPTIONS
        )


def fill(launches: Sequence[Launch]) -> None:
    """Random numbers into what no kernel wrote: zeros would draw less power and run faster."""
    for each in launches:
        for value in each.arguments.values():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
                value.normal_()


def call_of(problem: Problem, step: Call, config: Any, known: Known) -> Call:
    """What is timed of a problem with this configuration."""
    if problem.is_route:

        def whole() -> None:
            reached: list[bool] = []
            with tuned.deciding(decider(problem, config, known, lambda: reached.append(True))):
                step()
            assert_reached(problem, reached)

        return whole
    launches = launches_of(problem, step, config, known)
    fill(launches)
    return partial(replay, launches)


@dataclass(frozen=True)
class Timed:
    """Configurations of one choice with their times, the fastest first, and those that did not run, with why."""

    problem: Problem
    times: Mapping[Any, Spread]
    failures: Mapping[Any, str] = field(default_factory=dict)


def time_problem(
    problem: Problem,
    timer: GraphTimer,
    seconds: float,
    *,
    device: str = "cuda",
    most: int = MOST_CANDIDATES,
    known: Known | None = None,
) -> Timed:
    """The best `most` candidates by prediction, in turns. RuntimeError where none of them runs."""
    step = problem.subject.prepare(device)
    calls: dict[str, Sequence[Call]] = {}
    configs: dict[str, Any] = {}
    failures: dict[Any, str] = {}
    for config in shortlist(valid(problem.choice), most):
        try:
            call = call_of(problem, step, config, known or {})
            timer.warm_up([call])
        except Exception as error:
            if is_fatal(error):
                raise
            failures[config] = (str(error).strip().splitlines() or [""])[0]
            failures[config] = f"{type(error).__name__}: {failures[config]}"
            continue
        calls[str(config)], configs[str(config)] = [call], config
    spreads: dict[str, Spread] = {}
    if calls:
        spreads, notes = timer.device_times(calls, seconds)
        # Event timing, where capture failed, does not compare with graph replay.
        failures |= {configs[name]: "; ".join(notes[name]) for name in calls if notes[name]}
    times = {configs[name]: spread for name, spread in spreads.items() if configs[name] not in failures}
    if not times:
        reasons = "".join(f"\n    {config}: {why}" for config, why in failures.items())
        raise RuntimeError(f"bench tune: no configuration of {problem} runs:{reasons}")
    return Timed(problem, dict(sorted(times.items(), key=lambda each: each[1].median)), failures)


def row_of(timed: Timed, machine: Machine, gpu: str) -> Row:
    """The table's row: the fastest, and the next beside it."""
    (best, spread), *others = timed.times.items()
    runner_up = None
    if others:
        config, second = others[0]
        runner_up = {"config": asdict(config), "time_us": round(second.median, 3)}
    choice = timed.problem.choice
    commit = f"{machine.commit}{'-dirty' if machine.dirty else ''}" if machine.commit else machine.kronafuse
    return Row(
        choice.kernel,
        gpu,
        choice.key,
        asdict(best),
        round(spread.median, 3),
        runner_up,
        machine.date[:10],
        machine.command,
        commit,
        machine.triton or "none",
    )


def merged(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`rows` with those of the same kernel, GPU and key replaced."""
    return list({row.place: row for row in (*rows, *new)}.values())


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """The whole table, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial_path:
        partial_path.write_text(tuned.written(list(rows), NOTE), encoding="utf-8")


@dataclass
class Progress:
    """What tuning did: rows written, choices that failed with why, and choices that the budget did not reach."""

    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    left: list[Problem] = field(default_factory=list)


def tune(
    chosen: Sequence[Problem],
    path: Path,
    *,
    timer: GraphTimer,
    gpu: str,
    seconds: float,
    device: str = "cuda",
    most: int = MOST_CANDIDATES,
    machine: Machine | None = None,
    ready: Callable[[Problem, float], object] = lambda _problem, _seconds: None,
    report: Callable[[Timed], object] = lambda _timed: None,
) -> Progress:
    """Times every problem within the budget and rewrites the table at `path` after each; its other rows stay.

    In the order given: that of `problems` has the kernels of a route before it. A table that is not there yet starts
    with the rows of the one in use. A problem whose launches all fail is named in the result and the others go on.
    Raises ValueError where the table at `path` is none.

    ready: called before a problem is timed, with the seconds that are left; report: after it
    """
    machine = machine or describe()
    before = tuned.read(path if path.exists() else tuned.in_use())
    write_table(path, before)
    progress, known = Progress(), dict[tuple[object, ...], Any]()
    started = timer.clock()

    def left() -> float:
        return seconds - (timer.clock() - started)

    for index, problem in enumerate(chosen):
        if (remaining := left()) > 0:
            ready(problem, remaining)
            remaining = left()
        if remaining <= 0:
            progress.left = list(chosen[index:])
            break
        try:
            # Half of a fair share: the other half is for warming up and capturing.
            turn = max(LEAST_SECONDS, remaining / (len(chosen) - index) / 2)
            timed = time_problem(problem, timer, turn, device=device, most=most, known=known)
        except Exception as error:
            if is_fatal(error):
                raise
            progress.failures[str(problem)] = str(error)
            continue
        known[problem.place] = next(iter(timed.times))
        progress.rows.append(row_of(timed, machine, gpu))
        write_table(path, merged(before, progress.rows))
        report(timed)
    return progress


def cuda_architecture() -> Architecture:
    """This GPU. NotImplementedError without one, and where Triton interprets."""
    from ..env import triton_interprets
    from ..ops.launch import architecture_of

    if not torch.cuda.is_available():
        raise NotImplementedError(
            "bench tune: needs a CUDA device, and torch sees none; --dry-run lists the candidates without one"
        )
    if triton_interprets():
        raise NotImplementedError(
            "bench tune: TRITON_INTERPRET is set, and an interpreter's times say nothing"
        )
    found = architecture_of(torch.device("cuda"))
    if not found.name:
        raise NotImplementedError(
            "bench tune: needs an NVIDIA GPU; rows of the table are found by their names"
        )
    return found
