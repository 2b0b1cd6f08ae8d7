"""Runs the arms of named cases: checked first, then timed in turns, one row an arm."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from .arms import ARMS, CHAINS, Arm
from .arms.arm import forward_of, step_of
from .ceilings import dtype_name
from .checking import Checked, Checks, Seen, observe, require_evidence
from .device import is_fatal, is_lost
from .floors import Cost, cost, is_thin
from .problems import Problem, Spec
from .records import NOT_COVERED as NOT_COVERED
from .records import Ceilings, Row, Suite
from .timing import ArmError, Call, Timer, Timing

LOST = "the device was lost by"
"""Begins the error of the arm behind which nothing more runs on the device."""
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

    Where the device is lost, there are rows of the arms that failed alone: `lost_by` finds that out.
    """
    torch.compiler.reset()
    problem = spec.make()
    copies, notes = copies_of(problem, timer.cold_bytes())
    checks = Checks(problem)
    entries: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    for arm in arms:
        reasons = arm.reasons(spec)
        if lost_by(failed.values()):
            break
        if reasons:
            failed[arm.name] = f"{NOT_COVERED}: {'; '.join(reasons)}"
        else:
            try:
                entries[arm.name] = _prepare(arm, copies, checks)
            except Exception as error:
                failed[arm.name] = _failure(arm.name, error, spec.device)
    timings = _measure(entries, failed, timer, seconds)
    lost = lost_by(failed.values()) is not None
    rows = []
    for arm in arms:
        row = _row(spec, arm)
        if arm.name in failed:
            rows.append(replace(row, error=failed[arm.name], notes=()))
        elif not lost:
            rows.append(_measured(row, entries[arm.name], timings, ceilings, notes))
    del entries, checks, copies, problem
    gc.collect()
    if spec.device.type == "cuda" and not lost:
        torch.cuda.empty_cache()
    return rows


def lost_by(errors: Iterable[str | None]) -> str | None:
    """What lost the device, if one of the errors says so."""
    return next((each for each in errors if each is not None and each.startswith(LOST)), None)


def _failure(arm: str, error: Exception, device: torch.device) -> str:
    """The text of a row's error. Behind a fatal one nothing more runs in this process."""
    if is_fatal(error) or is_lost(device):
        return f"{LOST} {arm}: {_text(error)}"
    return _text(error)


def copies_of(problem: Problem, cold_bytes: int) -> tuple[list[Problem], tuple[str, ...]]:
    """The problem and as many copies as read more than the cache together; a note where memory forbids it."""
    read_bytes, size_bytes = max(problem.read_bytes(), 1), max(problem.size_bytes(), 1)
    wanted = max(2, cold_bytes // read_bytes + 1)
    allowed = max(2, min(MOST_COPIES, COPY_BYTES[problem.spec.device.type] // size_bytes))
    count = min(wanted, allowed)
    notes = ()
    if count < wanted:
        notes = (f"cold: {count} copies of {read_bytes} bytes read, less than {cold_bytes} bytes together",)
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
    while entries and lost_by(failed.values()) is None:
        try:
            steps = {name: entry.steps for name, entry in entries.items()}
            forwards = {name: entry.forward for name, entry in entries.items()}
            return timer.measure(steps, seconds, forwards)
        except ArmError as error:
            text = _failure(error.arm, error.error, timer.device)
            failed[error.arm] = text if text.startswith(LOST) else f"while it was timed: {text}"
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
    spent = row.from_memory_us
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
    """Of medians: device time, or wall time where neither has any; None where only one of them has."""
    if other is None or (timing.device_us is None) != (other.device_us is None):
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
