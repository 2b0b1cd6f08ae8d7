"""One run of the suites into one file, which is whole after every case."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .arms import Arm
from .ceilings import dtype_name, measure_ceilings
from .device import DeviceLostError
from .machine import describe, last_level_cache_bytes, with_clocks
from .records import Ceilings, Machine, Results, Row, Suite
from .selection import Options, Spec, specs
from .suites import arms_named, lost_by, run_spec
from .targets import judged
from .timing import CpuTimer, CudaTimer, Timer

SKIPPED = "Not run, the budget was used up: "
"""Begins the line of each case that a run did not begin."""
CACHE_BYTES = 32 * 2**20
"""Last-level cache of a CPU that does not say how large its is."""


def timer_of(device: torch.device) -> Timer:
    """The timer of a device."""
    if device.type == "cuda":
        return CudaTimer(device)
    return CpuTimer(last_level_cache_bytes() or CACHE_BYTES)


def continued(before: Results, machine: Machine, path: Path) -> Results:
    """The results in the file, to be added to by this process; their command becomes both."""
    old, new = asdict(before.machine), asdict(machine)
    for passing in (old, new):
        del passing["date"], passing["command"]
        (passing["gpu"] or {}).pop("clocks", None)
    if old["tuned"] is None:  # written before results named the table
        del old["tuned"]
    differing = [name for name in old if old[name] != new[name]]
    if differing:
        told = ", ".join(f"{name} {old[name]!r}, here {new[name]!r}" for name in differing)
        raise ValueError(f"kronafuse bench: {path.name} cannot be added to: it is of {told}")
    both = before.machine.command.split(" && ")
    command = " && ".join(dict.fromkeys([*both, machine.command]))
    return replace(before, machine=replace(before.machine, command=command))


def with_dtypes(before: Ceilings | None, timer: Timer, dtypes: Sequence[torch.dtype]) -> Ceilings:
    """The ceilings of before with the GEMM rates of further dtypes; measured where there are none."""
    if before is None:
        return measure_ceilings(timer, dtypes)
    further = [dtype for dtype in dtypes if dtype_name(dtype) not in before.gemm_flops_per_s]
    if not further:
        return before
    rates = measure_ceilings(timer, further).gemm_flops_per_s
    return replace(before, gemm_flops_per_s={**before.gemm_flops_per_s, **rates})


def _places(spec: Spec, arms: Sequence[Arm]) -> list[tuple[object, str]]:
    """What rows of all arms would be found by."""
    return [(spec.problem, arm.name) for arm in arms]


def run_suites(
    suites: Sequence[Suite],
    options: Options,
    arms: Sequence[str],
    path: Path,
    *,
    seconds: float,
    budget: float | None = None,
    add: bool = False,
    missing: bool = False,
    begin: Callable[[Machine, Ceilings], object] = lambda machine, ceilings: None,
    show: Callable[[Sequence[Row]], object] = lambda rows: None,
) -> tuple[Results, list[Spec]]:
    """The results, and what was not begun because the budget was used up.

    arms:    globs on names; none for all
    seconds: for the turns of one case and mode
    budget:  seconds after which no new case is begun
    add:     to the results that are at `path`; ValueError where they are of another machine, version or commit
    missing: only arms of a case that these results have no row of
    begin, show: are told of the machine, and of the rows of each case

    Raises DeviceLostError, with everything so far written, where nothing more runs on the device.
    """
    if seconds <= 0 or (budget is not None and budget <= 0):
        raise ValueError(
            f"kronafuse bench: --seconds and --budget must be above 0; got {seconds} and {budget}"
        )
    started = time.monotonic()
    asked = specs(suites, options)
    chosen = arms_named(suites, arms)
    path.parent.mkdir(parents=True, exist_ok=True)
    timer = timer_of(asked[0].device)
    machine = describe()
    before = continued(Results.read(path), machine, path) if add and path.exists() else Results(machine)
    known = {(row.problem, row.arm) for row in before.rows} if missing else set()
    asked = [spec for spec in asked if not known.issuperset(_places(spec, chosen[spec.suite]))]
    dtypes = list(dict.fromkeys(spec.dtype for spec in asked))
    ceilings = with_dtypes(before.ceilings, timer, dtypes)
    results = replace(before, ceilings=ceilings)
    if before.ceilings is None:
        results = replace(results, machine=with_clocks(results.machine))
    begin(results.machine, ceilings)
    results.write(path)
    for index, spec in enumerate(asked):
        if budget is not None and time.monotonic() - started > budget:
            return results, asked[index:]
        arms_left = [arm for arm in chosen[spec.suite] if (spec.problem, arm.name) not in known]
        rows = judged(run_spec(spec, arms_left, timer, ceilings, seconds), ceilings)
        for row in rows:
            results = results.with_row(row)
        results.write(path)
        show(rows)
        if lost := lost_by(row.error for row in rows):
            raise DeviceLostError(f"kronafuse bench: {spec}: {lost}")
    return results, []
