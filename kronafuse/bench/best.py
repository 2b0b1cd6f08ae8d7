"""The fastest baseline of each problem: what a speed-up is quoted against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import geometric_mean

from .records import Row

Problem = tuple[str, str, int, int, str, str]
NO_BASELINE = ("frozen", "peft_lora_r16")
"""The layer without the adapter, and another adapter: no way to compute the case."""


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
    baselines = [
        row
        for row in arms.values()
        if row.impl is None and row.arm not in NO_BASELINE and row.time_us is not None
    ]
    return min(baselines, key=lambda row: _median(row), default=None)


def times_faster(row: Row, other: Row) -> float:
    """How many times faster `row` is than `other`: the ratio of their medians."""
    return _median(other) / _median(row)


def same_time(row: Row, other: Row) -> bool:
    """Whether the two cannot be told apart."""
    assert row.time_us is not None
    assert other.time_us is not None
    return row.time_us.equals(other.time_us)


def no_slower(row: Row, other: Row) -> bool:
    """Whether `row` is faster, or cannot be told apart."""
    return times_faster(row, other) >= 1 or same_time(row, other)


def fastest_of_ours(arms: Mapping[str, Row]) -> Row | None:
    """The fastest of our implementations that ran, which `auto` could take."""
    ours = [row for row in arms.values() if row.impl is not None and row.time_us is not None]
    return min(ours, key=lambda row: row.time_us.median if row.time_us else 0.0, default=None)


def mean_of(ratios: Sequence[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return geometric_mean(ratios) if ratios else None


def _median(row: Row) -> float:
    assert row.time_us is not None
    return row.time_us.median
