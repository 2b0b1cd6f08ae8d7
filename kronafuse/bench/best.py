"""The fastest baseline of each problem: what a speed-up is quoted against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import geometric_mean

from ..testing.cases import CASES
from .records import Row

Problem = tuple[str, str, int, int, str, str]
NO_BASELINE = ("frozen",)
"""The layer without the adapter: no way to compute the case. PEFT's LoRA is none of another adapter either."""


def by_problem(rows: Iterable[Row]) -> dict[Problem, dict[str, Row]]:
    """Problem -> arm -> row, of rows without an error, in the order in which they came."""
    found: dict[Problem, dict[str, Row]] = {}
    for row in rows:
        arms = found.setdefault(row.problem, {})
        if row.error is None:
            arms[row.arm] = row
    return found


def best_baseline(arms: Mapping[str, Row]) -> Row | None:
    """The fastest arm that computes the case and is not ours."""
    baselines = [row for row in _timed_alike(arms.values()) if row.impl is None and _is_baseline(row)]
    return min(baselines, key=_median, default=None)


def _is_baseline(row: Row) -> bool:
    """Whether the arm computes the case: LoRA does where the case is LoRA."""
    if row.arm == "peft_lora_r16":
        return row.case in CASES and not CASES[row.case].has_a
    return row.arm not in NO_BASELINE


def same_basis(row: Row, other: Row) -> bool:
    """Whether both have device time, or neither has: wall time does not compare with it."""
    return (row.device_us is None) == (other.device_us is None)


def _timed_alike(rows: Iterable[Row]) -> list[Row]:
    """Those with device time where any has it, else those with wall time."""
    timed = [row for row in rows if row.time_us is not None]
    return [row for row in timed if row.device_us is not None] or timed


def times_faster(row: Row, other: Row) -> float:
    """How many times faster `row` is than `other`: the ratio of their medians."""
    return _median(other) / _median(row)


def same_time(row: Row, other: Row) -> bool:
    """Whether the two, of one basis, cannot be told apart."""
    assert row.time_us is not None
    assert other.time_us is not None
    return row.time_us.equals(other.time_us)


def no_slower(row: Row, other: Row) -> bool:
    """Whether `row` is faster, or cannot be told apart."""
    return times_faster(row, other) >= 1 or same_time(row, other)


def fastest_of_ours(arms: Mapping[str, Row]) -> Row | None:
    """The fastest of our implementations that ran, which `auto` could take."""
    ours = [row for row in _timed_alike(arms.values()) if row.impl is not None]
    return min(ours, key=_median, default=None)


def mean_of(ratios: Sequence[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return geometric_mean(ratios) if ratios else None


def _median(row: Row) -> float:
    assert row.time_us is not None
    return row.time_us.median
