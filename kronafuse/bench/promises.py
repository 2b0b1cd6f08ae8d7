"""One promise beside what was measured of it: its limit, its figure, its verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .best import mean_of
from .records import Row, Verdict


@dataclass(frozen=True)
class Target:
    """One promise: its limit in words, the figure, over how many cases, and whether it is kept."""

    name: str
    limit: str
    figure: str
    cases: int
    verdict: Verdict


def with_failures(target: Target, failed: Iterable[Row]) -> Target:
    """The target with the cases that failed: it is not met."""
    count = len(list(failed))
    if not count:
        return target
    figure = f"{target.cases} of {target.cases + count}, {count} failed"
    if target.figure:
        figure = f"{target.figure}; {figure}"
    return replace(target, figure=figure, verdict="missed")


def verdict_of(met: bool) -> Verdict:
    return "met" if met else "missed"


def at_most(name: str, limit: float, ratios: Sequence[float], unit: str = "") -> Target:
    """The geometric mean against its largest allowed value."""
    return mean_within(name, f"at most {limit}{unit}", ratios, lambda mean: mean <= limit)


def at_least(name: str, limit: float, ratios: Sequence[float]) -> Target:
    return mean_within(name, f"at least {limit} times faster", ratios, lambda mean: mean >= limit)


def mean_within(name: str, limit: str, ratios: Sequence[float], keeps: Callable[[float], bool]) -> Target:
    mean = mean_of(ratios)
    if mean is None:
        return Target(name, limit, "", 0, "not measured")
    figure = f"geometric mean {mean:.3g}, {min(ratios):.3g} to {max(ratios):.3g}"
    return Target(name, limit, figure, len(ratios), verdict_of(keeps(mean)))


def every(
    name: str, limit: str, values: Sequence[float], keeps: Callable[[float], bool], unit: str
) -> Target:
    """What must hold of each case."""
    if not values:
        return Target(name, limit, "", 0, "not measured")
    kept = sum(map(keeps, values))
    figure = f"{kept} of {len(values)} within, {min(values):.3g} to {max(values):.3g}{unit}"
    return Target(name, limit, figure, len(values), verdict_of(kept == len(values)))


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
