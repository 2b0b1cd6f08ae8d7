"""The design of a results table: its factors, its observations and what is missing of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from ...nn.positions import PAIRS
from .table import (
    FACTORS,
    FAMILY,
    PAIR,
    SEED,
    STATUS,
    Condition,
    check_columns,
    check_response,
    level,
    levels_of,
    row_name,
    unfinished,
)


@dataclass(frozen=True)
class Design:
    """data:           one row an observation: every factor's level as text, and the response
    configurations: the same, with the mean of each configuration's runs for its observation; a configuration
                    is the values of all axes but the seed, whether they are factors here or not
    factors:        those that vary -> their levels in order
    left_out:       factors that are not analysed -> why
    missing:        runs and cells without a response, by name
    """

    data: pd.DataFrame
    configurations: pd.DataFrame
    response: str
    factors: dict[str, list[str]]
    left_out: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def values(self) -> np.ndarray:
        """The observations."""
        return self.data[self.response].to_numpy(float)

    @property
    def replicated(self) -> bool:
        """Whether some configuration has several runs."""
        return len(self.configurations) < len(self.data)

    def over_configurations(self) -> Design:
        """The design whose observations are the configurations' means."""
        return replace(self, data=self.configurations)


def make_design(
    table: pd.DataFrame,
    response: str,
    *,
    factors: Sequence[str] | None,
    conditions: Sequence[Condition],
    allow_missing: bool,
) -> Design:
    """The observations of a filtered table.

    factors: those to analyse; None for every axis that varies

    Raises ValueError for a response or factors that do not exist, for two runs of one configuration and seed,
    for missing runs and cells unless allowed, for fewer than two levels and for a response that does not vary.
    """
    waiting = unfinished(table).to_numpy()
    if len(table) and waiting.all():
        states = table[STATUS].map(level).replace("", "no status").value_counts()
        raise ValueError(
            f"anova: none of the {len(table)} runs has finished"
            f" ({', '.join(f'{count} {name}' for name, count in states.items())}); the same kronafuse sweep goes on"
        )
    numbers = check_response(table, response)
    chosen, left_out = _factors(table, factors)
    configurations = _configurations(table, chosen)
    _check_single(table, configurations)
    values = numbers.to_numpy()
    there = np.isfinite(values) & ~waiting
    missing = [
        row_name(row) + (f" ({level(row[STATUS]) or 'no status'})" if late else "")
        for (_, row), late in zip(table[~there].iterrows(), waiting[~there], strict=True)
    ]
    missing += _missing_cells(table, chosen, conditions) + _missing_seeds(table, configurations)
    if missing and not allow_missing:
        raise ValueError(
            f"anova: {len(missing)} runs or cells are missing {response}: {'; '.join(missing)}. Run them (the same"
            " kronafuse sweep goes on, --retry-failed redoes failed runs), leave them out by --where, or go on"
            " without them by --allow-missing"
        )
    rows = table.loc[there]
    if rows.empty:
        raise ValueError(f"anova: none of the {len(table)} rows has a {response}")
    data = pd.DataFrame({name: rows[name].map(level) for name in chosen})
    data[response] = values[there]
    kept = {}
    for name in chosen:
        present = [each for each in levels_of(rows[name]) if each in set(data[name])]
        if len(present) < 2:
            left_out[name] = f"one level: {', '.join(present) or 'none'}"
        else:
            kept[name] = present
    if not kept or (factors is not None and len(kept) < len(factors)):
        named = "; ".join(
            f"{name} has {why}" for name, why in left_out.items() if not factors or name in factors
        )
        raise ValueError(f"anova: a factor needs at least two levels; {named}")
    if np.ptp(data[response].to_numpy(float)) == 0:
        raise ValueError(
            f"anova: the response {response} is {data[response].iloc[0]:g} in all {len(data)} observations;"
            " there is no variance to analyse"
        )
    grouped = data.groupby(configurations[there], sort=False)
    means = grouped.first().assign(**{response: grouped[response].mean()})
    return Design(
        data.reset_index(drop=True), means.reset_index(drop=True), response, kept, left_out, tuple(missing)
    )


def _factors(table: pd.DataFrame, asked: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The factors to look at, and those left out because some rows have no level of them."""
    if asked is not None:
        if not asked or len(set(asked)) != len(asked):
            raise ValueError(f"anova: factors must be different columns; got {', '.join(asked) or 'none'}")
        check_columns(table, asked, "factors")
        if SEED in asked:
            raise ValueError("anova: seed is no factor: the seeds of a configuration are its replicates")
    chosen, left_out = [], {}
    for name in asked if asked is not None else FACTORS:
        if name not in table.columns:
            continue
        empty = int((table[name].map(level) == "").sum())
        if empty and asked is not None:
            raise ValueError(
                f"anova: factor {name} is empty in {empty} of {len(table)} rows; leave those out by --where"
            )
        if empty == len(table):
            continue
        if empty:
            left_out[name] = f"no level in {empty} of {len(table)} rows"
        elif asked is None and FAMILY in chosen and _decided_by_family(table, name):
            left_out[name] = f"decided by {FAMILY}"
        else:
            chosen.append(name)
    return chosen, left_out


def _decided_by_family(table: pd.DataFrame, name: str) -> bool:
    """Whether a column has one level in each of several families, and not the same in all."""
    levels = table[name].map(level).groupby(table[FAMILY].map(level)).nunique()
    return len(levels) > 1 and levels.max() == 1 and table[name].map(level).nunique() > 1


def _configurations(table: pd.DataFrame, factors: Sequence[str]) -> pd.Series:
    """Each row's configuration, as a number: rows are of one where all axes and all factors are alike."""
    names = [name for name in dict.fromkeys([*FACTORS, *factors]) if name in table.columns and name != SEED]
    return pd.DataFrame({name: table[name].map(level) for name in names}).groupby(names, sort=False).ngroup()


def _check_single(table: pd.DataFrame, configurations: pd.Series) -> None:
    """ValueError that names the rows which have the same axes and the same seed."""
    if SEED not in table.columns:
        return
    runs = pd.DataFrame({"configuration": configurations, SEED: table[SEED].map(level)})
    twice = table[runs.duplicated(keep=False)]
    if len(twice):
        named = "; ".join(row_name(row) for _, row in twice.iterrows())
        raise ValueError(
            f"anova: {len(twice)} rows have the axes and the seed of another one: {named}. Leave all but one of"
            " each out, by --where or from the file"
        )


def _missing_cells(table: pd.DataFrame, factors: Sequence[str], conditions: Sequence[Condition]) -> list[str]:
    """Combinations of the factors' levels without any run, source and sink only in legal pairs."""
    levels = {name: levels_of(table[name]) for name in factors if name != SEED}
    names = [name for name, its in levels.items() if len(its) > 1 or name in ("source", "sink")]
    if not names:
        return []
    present = set(zip(*(table[name].map(level) for name in names), strict=True))
    taken = _taken_by_family(table, names)
    missing = []
    for combination in itertools.product(*(levels[name] for name in names)):
        cell = dict(zip(names, combination, strict=True))
        fits = not taken or all((cell[FAMILY], name, value) in taken for name, value in cell.items())
        if combination not in present and fits and _possible(cell, conditions):
            missing.append(f"{_cell_name(cell)} (no runs)")
    return missing


def _taken_by_family(table: pd.DataFrame, names: Sequence[str]) -> set[tuple[str, str, str]]:
    """(family, factor, level) of what some run has: a family need not take the levels of another."""
    if FAMILY not in names:
        return set()
    families = table[FAMILY].map(level)
    return {
        (family, name, each)
        for name in names
        for family, each in zip(families, table[name].map(level), strict=True)
    }


def _possible(cell: dict[str, str], conditions: Sequence[Condition]) -> bool:
    """Whether the cell's source, sink and pair fit each other, and no filter on pairs drops them."""
    source, sink = cell.get("source"), cell.get("sink")
    if PAIR in cell:
        its_source, its_sink = cell[PAIR].split(" -> ")
        return source in (None, its_source) and sink in (None, its_sink)
    if source is None or sink is None:
        return True
    pair = f"{source} -> {sink}"
    return (source, sink) in PAIRS and all(each.accepts(pair) for each in conditions if each.column == PAIR)


def _cell_name(cell: dict[str, str]) -> str:
    words = []
    if {"source", "sink"} <= set(cell):
        words = [f"pair {cell['source']} -> {cell['sink']}"]
        cell = {name: value for name, value in cell.items() if name not in ("source", "sink", PAIR)}
    return ", ".join(words + [f"{name}={value}" for name, value in cell.items()])


def _missing_seeds(table: pd.DataFrame, configurations: pd.Series) -> list[str]:
    """Runs without which not every configuration has every seed."""
    if SEED not in table.columns:
        return []
    seeds = levels_of(table[SEED])
    missing = []
    for _, rows in table.groupby(configurations, sort=False):
        absent = [each for each in seeds if each not in set(rows[SEED].map(level))]
        name = row_name(rows.iloc[0].drop([SEED, "id"], errors="ignore"))
        missing += [f"{name} seed={seed} (no run)" for seed in absent]
    return missing
