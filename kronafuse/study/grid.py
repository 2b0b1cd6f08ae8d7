"""From a study file and options to the list of runs."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..nn.bottleneck_spec import FORMS
from ..nn.positions import PAIRS, SINKS, SOURCES, check_pair
from .families import FAMILIES, FORMS_WITH, Config, adapter_spec, axes_of, axis_value, default_of, has_axis

KEYS = ("job", "seeds", "settings", "adapters")
"""The keys of a study file."""

ALL = "all"
"""`pairs = "all"`: the twenty legal pairs of positions."""

SEEDS_BELOW = 2**63
"""A seed is a column of 64-bit integers in the results."""


@dataclass(frozen=True)
class Grid:
    """configs: every run once, in the order of the tables; illegal: pairs of a cross product left out."""

    configs: tuple[Config, ...]
    illegal: tuple[str, ...] = ()


def run_id(job: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Twelve hex digits that name a run by its job, settings and axes.

    Axes at their family's default do not count, so that a new axis leaves the names of older runs as they are.
    """
    family = config["family"]
    chosen = {
        name: value
        for name, value in config.items()
        if name in ("family", "seed") or value != axis_value(name, default_of(family, name))
    }
    decisive = json.dumps([job, dict(settings), chosen], sort_keys=True)
    return hashlib.sha256(decisive.encode()).hexdigest()[:12]


def make_grid(adapters: Sequence[Mapping[str, Any]], seeds: Iterable[int]) -> Grid:
    """The runs of all tables for every seed.

    adapters: tables with a `family` and, for each of its axes, a value or a list of values; a bottleneck
              takes `pairs` instead of source and sink: "all", or a list of "source -> sink"
    seeds:    integers, each once

    An illegal pair in a cross product of sources and sinks is left out and listed in `illegal`. An axis that
    a run's form does not have is at its default there, and runs that differ in nothing else are one. Raises
    ValueError for an unknown family or axis, for an axis that no form of its table has, for one illegal pair
    asked for by name, for a cross product without a legal pair, and what the specs refuse.
    """
    chosen = _seeds(seeds)
    if not adapters:
        raise ValueError("sweep: the grid needs an adapter family; give [[adapters]] tables or --family")
    configs: dict[str, Config] = {}
    illegal: list[str] = []
    for table in adapters:
        for config in _expand(table, illegal):
            adapter_spec(config)
            for seed in chosen:
                run = {**config, "seed": seed}
                configs.setdefault(run_id("", {}, run), run)
    return Grid(tuple(configs.values()), tuple(dict.fromkeys(illegal)))


def _seeds(seeds: Iterable[int]) -> list[int]:
    chosen = list(seeds)
    if not chosen or len(set(chosen)) != len(chosen) or any(type(each) is not int for each in chosen):
        raise ValueError(f"sweep: seeds must be different integers, at least one; got {chosen!r}")
    if min(chosen) < 0:
        raise ValueError(f"sweep: seeds must be at least 0; got {min(chosen)}")
    if max(chosen) >= SEEDS_BELOW:
        raise ValueError(f"sweep: seeds must be below 2**63 = {SEEDS_BELOW}; got {max(chosen)}")
    return chosen


def _expand(table: Mapping[str, Any], illegal: list[str]) -> list[Config]:
    remaining = dict(table)
    family = remaining.pop("family", None)
    axes = axes_of(str(family) if family is not None else "")
    places: list[tuple[str, str] | None] = [None]
    if family == "bottleneck":
        check_together(remaining)
        places = list(_places(remaining, illegal))
        axes = axes[2:]
    unknown = [name for name in remaining if name not in axes]
    if unknown:
        own = ("pairs", *FAMILIES["bottleneck"][1]) if family == "bottleneck" else axes
        raise ValueError(
            f"sweep: family {family!r} has no axis {', '.join(unknown)}; its axes are: {', '.join(own)}"
        )
    if family == "bottleneck":
        _check_forms(remaining)
    if "budget" in remaining:
        remaining["width"] = [None]
    values = [axis_values(axis, remaining.get(axis, [default_of(str(family), axis)])) for axis in axes]
    configs = []
    for place, combination in itertools.product(places, itertools.product(*values)):
        position = {} if place is None else {"source": place[0], "sink": place[1]}
        config = {"family": family, **position, **dict(zip(axes, combination, strict=True))}
        absent = [axis for axis in axes if not has_axis(config, axis)]
        config |= {axis: None if axis == "width" else default_of(str(family), axis) for axis in absent}
        configs.append(config)
    return configs


def check_together(given: Collection[str]) -> None:
    """ValueError for keys, or options, of which each says what the other one says too."""
    if "pairs" in given and ("source" in given or "sink" in given):
        raise ValueError("sweep: give pairs, or source and sink, not both")
    if "width" in given and "budget" in given:
        raise ValueError("sweep: give width or budget, not both; a budget chooses the width")


def _check_forms(table: Mapping[str, Any]) -> None:
    """ValueError for axes that no form of the table has."""
    forms = axis_values("form", table.get("form", [default_of("bottleneck", "form")]))
    absent = [axis for axis, those in FORMS_WITH.items() if axis in table and not set(forms) & set(those)]
    if absent and set(forms) <= set(FORMS):
        having = "; ".join(f"{axis} is for {', '.join(FORMS_WITH[axis])}" for axis in absent)
        raise ValueError(f"sweep: form {', '.join(forms)} has no axis {', '.join(absent)}: {having}")


def axis_values(axis: str, values: Any) -> list[Any]:
    """One value or a list of them as the axis's values; ValueError where one comes twice or there is none."""
    listed = values if isinstance(values, list) else [values]
    converted = [axis_value(axis, each) for each in listed]
    if not converted or len(set(converted)) != len(converted):
        raise ValueError(f"sweep: {axis} must have different values, at least one; got {values!r}")
    return converted


def _places(remaining: dict[str, Any], illegal: list[str]) -> Iterable[tuple[str, str]]:
    if "pairs" in remaining:
        pairs = remaining.pop("pairs")
        return tuple(PAIRS) if pairs == ALL else [_named_pair(each) for each in _listed(pairs)]
    sources, sinks = (
        axis_values(axis, remaining.pop(axis, [default_of("bottleneck", axis)]))
        for axis in ("source", "sink")
    )
    _check_names(sources, sinks)
    crossed = list(itertools.product(sources, sinks))
    legal = [pair for pair in crossed if pair in set(PAIRS)]
    if len(crossed) == 1 and not legal:
        return [_named_pair(pair_text(crossed[0]))]
    if not legal:
        raise ValueError(
            f"sweep: no legal pair of source {', '.join(sources)} and sink {', '.join(sinks)};"
            f" the legal pairs are: {', '.join(map(pair_text, PAIRS))}"
        )
    illegal.extend(pair_text(pair) for pair in crossed if pair not in set(PAIRS))
    return legal


def _named_pair(text: Any) -> tuple[str, str]:
    parts = [part.strip() for part in text.split("->")] if isinstance(text, str) else []
    if len(parts) != 2:
        raise ValueError(f'sweep: a pair is written "source -> sink"; got {text!r}')
    check_pair("sweep", *parts)
    return parts[0], parts[1]


def pair_text(pair: tuple[str, str]) -> str:
    """How a pair of positions is written."""
    return f"{pair[0]} -> {pair[1]}"


def _check_names(sources: list[str], sinks: list[str]) -> None:
    for axis, given, known in (("source", sources, SOURCES), ("sink", sinks, SINKS)):
        unknown = [each for each in given if each not in known]
        if unknown:
            raise ValueError(f"sweep: {axis} must be one of {', '.join(known)}; got {', '.join(unknown)}")


def _listed(value: Any) -> list[Any]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise ValueError("sweep: pairs must name at least one pair; got []")
    return listed
