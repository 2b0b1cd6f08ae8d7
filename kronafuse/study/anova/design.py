"""The design of a results table: its factors, its observations and what is missing of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ...nn.positions import PAIRS
from ..families import describe
from .table import FACTORS, PAIR, SEED, Condition, check_columns, check_response, level, levels_of

RUNS, CELLS = "runs", "cells"
OVER = (RUNS, CELLS)
"""What an observation is: a run, so that seeds are replicates, or the mean of a cell's runs."""


@dataclass(frozen=True)
class Design:
    """data:     one row an observation: every factor's level as text, and the response
    factors:  those that vary -> their levels in order
    left_out: factors that are not analysed -> why
    missing:  runs and cells without a response, by name
    """

    data: pd.DataFrame
    response: str
    over: str
    factors: dict[str, list[str]]
    left_out: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def values(self) -> np.ndarray:
        """The observations."""
        return self.data[self.response].to_numpy(float)


def make_design(
    table: pd.DataFrame,
    response: str,
    *,
    factors: Sequence[str] | None,
    over: str,
    conditions: Sequence[Condition],
    allow_missing: bool,
) -> Design:
    """The observations of a filtered table.

    factors: those to analyse; None for every axis that varies

    Raises ValueError for a response or factors that do not exist, for missing cells unless allowed, for fewer
    than two levels and for a response that does not vary.
    """
    if over not in OVER:
        raise ValueError(f"anova: over must be one of {', '.join(OVER)}; got {over!r}")
    check_response(table, response)
    chosen, left_out = _factors(table, factors)
    values = table[response].to_numpy(float, na_value=np.nan)
    there = np.isfinite(values)
    missing = [_name(row) for _, row in table[~there].iterrows()]
    rows = table.loc[there]
    missing += _missing_cells(rows, chosen, conditions)
    if missing and not allow_missing:
        raise ValueError(
            f"anova: {len(missing)} cells are missing {response}: {'; '.join(missing)}. Run them (kronafuse sweep"
            " --retry-failed redoes failed runs), leave them out by --where, or go on without them by"
            " --allow-missing"
        )
    data = pd.DataFrame({name: rows[name].map(level) for name in chosen})
    data[response] = values[there]
    if over == CELLS:
        data = pd.DataFrame(data.groupby(chosen, sort=False)[response].mean()).reset_index()
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
    return Design(data.reset_index(drop=True), response, over, kept, left_out, tuple(missing))


def _factors(table: pd.DataFrame, asked: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The factors to look at, and those left out because some rows have no level of them."""
    if asked is not None:
        if not asked or len(set(asked)) != len(asked):
            raise ValueError(f"anova: factors must be different columns; got {', '.join(asked) or 'none'}")
        check_columns(table, asked, "factors")
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
        else:
            chosen.append(name)
    return chosen, left_out


def _name(row: pd.Series) -> str:
    """A run by its id and axes."""
    values = {str(name): value for name, value in row.items() if level(value)}
    words = [str(values["id"])] if "id" in values else []
    return " ".join([*words, describe(values)])


def _missing_cells(rows: pd.DataFrame, factors: Sequence[str], conditions: Sequence[Condition]) -> list[str]:
    """Legal pairs of positions, and combinations of the other factors' levels, that have no run with a response."""
    missing = []
    if {"source", "sink"} <= set(factors) or PAIR in factors:
        present = set(zip(rows["source"].map(level), rows["sink"].map(level), strict=True))
        for source, sink in PAIRS:
            cell = {"source": source, "sink": sink, PAIR: f"{source} -> {sink}"}
            wanted = all(each.accepts(cell[each.column]) for each in conditions if each.column in cell)
            if wanted and (source, sink) not in present:
                missing.append(f"pair {cell[PAIR]} (no runs)")
    others = [name for name in factors if name not in ("source", "sink", PAIR, SEED)]
    combined = set(zip(*(rows[name].map(level) for name in others), strict=True))
    for combination in itertools.product(*(levels_of(rows[name]) for name in others)):
        if others and combination not in combined:
            named = ", ".join(f"{name}={value}" for name, value in zip(others, combination, strict=True))
            missing.append(f"{named} (no runs)")
    return missing
