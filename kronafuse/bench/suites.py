"""Runs the arms of named cases: checked first, then timed in turns, one row an arm."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from .arms import ARMS, CHAINS, Arm
from .arms.arm import forward_of, step_of
from .ceilings import dtype_name
from .checking import Checked, Checks, Seen, observe, require_evidence
from .floors import Cost, cost, is_thin
from .problems import Problem, Spec
from .records import Ceilings, Row, Suite
from .timing import ArmError, Call, Timer, Timing

NOT_COVERED = "does not cover this case"
"""Begins the error of a row whose arm has reasons against the case; every other error is a failure."""
MOST_COPIES = 64
COPY_BYTES = {"cuda": 2**34, "cpu": 2**31}
"""What the copies of a problem may take together."""


@dataclass
class Entry:
    """An arm on its way to a row."""

    arm: Arm
    steps: Sequence[Call]
    forward: Call
    cost: Cost
    checked: Checked
    seen: Seen
    peak_bytes: int | None


def run_spec(
    spec: Spec, arms: Sequence[Arm], timer: Timer, ceilings: Ceilings | None, seconds: float
) -> list[Row]:
    """One row for every arm, in their order. What an arm raises becomes its row's error; the others go on.

    seconds: for the turns of all arms together; checks and compilation come on top
    """
    torch.compiler.reset()
    problem = spec.make()
    copies, notes = copies_of(problem, timer.cold_bytes())
    checks = Checks(problem)
    entries: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    for arm in arms:
        reasons = arm.reasons(spec)
        if reasons:
            failed[arm.name] = f"{NOT_COVERED}: {'; '.join(reasons)}"
            continue
        try:
            entries[arm.name] = _prepare(arm, copies, checks)
        except Exception as error:
            failed[arm.name] = _text(error)
    timings = _measure(entries, failed, timer, seconds)
    rows = []
    for arm in arms:
        row = _row(spec, arm)
        if arm.name in failed:
            rows.append(replace(row, error=failed[arm.name], notes=()))
        else:
            rows.append(_measured(row, entries[arm.name], timings, ceilings, notes))
    del entries, checks, copies, problem
    gc.collect()
    if spec.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def copies_of(problem: Problem, cold_bytes: int) -> tuple[list[Problem], tuple[str, ...]]:
    """The problem and as many copies as exceed the cache together; a note where memory forbids it."""
    size_bytes = max(problem.size_bytes(), 1)
    wanted = max(2, cold_bytes // size_bytes + 1)
    allowed = max(2, min(MOST_COPIES, COPY_BYTES[problem.spec.device.type] // size_bytes))
    count = min(wanted, allowed)
    notes = ()
    if count < wanted:
        notes = (f"cold: {count} copies of {size_bytes} bytes, less than {cold_bytes} bytes together",)
    return [problem, *(problem.copy() for _ in range(count - 1))], notes


def _prepare(arm: Arm, copies: Sequence[Problem], checks: Checks) -> Entry:
    """Checked, profiled, and built on every copy."""
    problem = copies[0]
    device = problem.spec.device
    checked = checks.check(arm)
    built = arm.build(problem)
    step = step_of(built, problem)
    seen = observe(step, device)
    require_evidence(arm, seen)
    steps = [step, *(step_of(arm.build(copy), copy) for copy in copies[1:])]
    return Entry(
        arm,
        steps,
        forward_of(built, problem),
        cost((built.own or problem).spec, adapted=arm.adapted),
        checked,
        seen,
        peak_bytes(step, device),
    )


def peak_bytes(step: Call, device: torch.device) -> int | None:
    """What one call allocates at most, above what was allocated before; None without an allocator to ask."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _measure(
    entries: dict[str, Entry], failed: dict[str, str], timer: Timer, seconds: float
) -> Mapping[str, Timing]:
    """Times of all entries; one that raises is taken out, and the others are measured anew."""
    while entries:
        try:
            steps = {name: entry.steps for name, entry in entries.items()}
            forwards = {name: entry.forward for name, entry in entries.items()}
            return timer.measure(steps, seconds, forwards)
        except ArmError as error:
            failed[error.arm] = f"while it was timed: {_text(error.error)}"
            del entries[error.arm]
    return {}


def _row(spec: Spec, arm: Arm) -> Row:
    notes = ()
    if arm.adapted and spec.factor_dtype != spec.dtype:
        notes = (f"parameters in {dtype_name(spec.factor_dtype)}",)
    return Row(
        spec.suite, spec.case.name, spec.batch, spec.tokens, dtype_name(spec.dtype), spec.mode, arm.name,
        impl=arm.impl, thin=is_thin(spec), notes=notes,
    )  # fmt: skip


def _measured(
    row: Row, entry: Entry, timings: Mapping[str, Timing], ceilings: Ceilings | None, notes: tuple[str, ...]
) -> Row:
    timing = timings[row.arm]
    row = replace(
        row,
        device_us=timing.device_us,
        device_cold_us=timing.device_cold_us,
        wall_us=timing.wall_us,
        wall_cold_us=timing.wall_cold_us,
        host_us=timing.host_us,
        accuracy=entry.checked.accuracy,
        yardstick=entry.checked.yardstick,
        truth_tokens=entry.checked.tokens,
        peak_bytes=entry.peak_bytes,
        flops=entry.cost.flops,
        bytes_moved=entry.cost.size_bytes,
        kernels=entry.seen.listed,
        launches=entry.seen.launches,
        notes=(*row.notes, *notes, *timing.notes),
    )
    spent = row.time_us
    assert spent is not None
    floor = ceilings.floor_us(entry.cost.flops, entry.cost.size_bytes, row.dtype) if ceilings else None
    return replace(
        row,
        ratio_to_frozen=_ratio(timing, timings.get("frozen")),
        ratio_to_chain=_ratio(timing, timings.get(CHAINS[row.suite])),
        floor_us=floor,
        percent_of_floor=None if floor is None else 100 * floor / spent.median,
    )


def _ratio(timing: Timing, other: Timing | None) -> float | None:
    """Of medians: device time where both have it, else wall time."""
    if other is None:
        return None
    if timing.device_us and other.device_us:
        return timing.device_us.median / other.device_us.median
    assert timing.wall_us is not None
    assert other.wall_us is not None
    return timing.wall_us.median / other.wall_us.median


def _text(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:4])}"


def arms_named(suites: Sequence[Suite], patterns: Sequence[str]) -> dict[Suite, list[Arm]]:
    """Arms whose names match one of the patterns (all where there are none), and those that ratios are made with.

    Raises ValueError where a pattern matches no arm of any of the suites.
    """
    known = list(dict.fromkeys(arm.name for suite in suites for arm in ARMS[suite]))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"kronafuse bench: no arm of {', '.join(suites)} matches {pattern!r}; there are {', '.join(known)}"
            )
    return {suite: [arm for arm in ARMS[suite] if _wanted(suite, arm, patterns)] for suite in suites}


def _wanted(suite: Suite, arm: Arm, patterns: Sequence[str]) -> bool:
    if not patterns or arm.name in ("frozen", CHAINS[suite]):
        return True
    return any(fnmatchcase(arm.name, each) for each in patterns)
