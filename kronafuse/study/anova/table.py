"""Results files: read, checked, and filtered by conditions on their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...nn.positions import POSITIONS, SINKS, SOURCES
from ..families import AXES

FACTORS = ("family", *AXES)
"""Columns that are factors of a design; the seed makes replicates."""

SEED = "seed"
PAIR = "pair"
"""A column made of source and sink, for `--factors pair`."""


@dataclass(frozen=True)
class Condition:
    """`column=value,...` keeps these levels, `column!=value,...` drops them."""

    column: str
    values: tuple[str, ...]
    keeps: bool

    def accepts(self, level: str) -> bool:
        """Whether a row with this level stays."""
        return (level in self.values) == self.keeps

    def __str__(self) -> str:
        return f"{self.column}{'=' if self.keeps else '!='}{','.join(self.values)}"


def parse_condition(text: str) -> Condition:
    """ValueError where the text is no condition."""
    column, separator, values = text.partition("!=")
    keeps = not separator
    if keeps:
        column, separator, values = text.partition("=")
    listed = tuple(each.strip() for each in values.split(","))
    if not separator or not column.strip() or not all(listed):
        raise ValueError(f"anova: a filter is written column=value,... or column!=value,...; got {text!r}")
    return Condition(column.strip(), listed, keeps)


def read_results(path: Path) -> pd.DataFrame:
    """The table of a .csv or .parquet file, with a column `pair` where it has source and sink.

    Raises FileNotFoundError, ValueError for a file that cannot be read as what its name says, for one without
    rows and for one that has none of a design's columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"anova: results file {path} does not exist")
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"anova: a results file ends in .csv or .parquet; got {path}")
    try:
        table = readers[path.suffix](path)
    except (ValueError, OSError) as error:
        raise ValueError(f"anova: {path} cannot be read as {path.suffix[1:]}: {error}") from error
    if not set(table.columns) & set(FACTORS):
        raise ValueError(
            f"anova: {path} is no results file: it has none of the columns {', '.join(FACTORS)};"
            f" it has {', '.join(map(str, table.columns))}"
        )
    if table.empty:
        raise ValueError(f"anova: {path} has no rows")
    if {"source", "sink"} <= set(table.columns):
        both = table["source"].notna() & table["sink"].notna()
        names = table["source"].astype(str) + " -> " + table["sink"].astype(str)
        table[PAIR] = names.where(both, None)
    return table


def check_columns(table: pd.DataFrame, names: Sequence[str], what: str) -> None:
    """ValueError that lists the columns that are missing and those that are there."""
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise ValueError(
            f"anova: {what} {', '.join(missing)}: no such column; the file has {', '.join(table.columns)}"
        )


def check_response(table: pd.DataFrame, response: str) -> None:
    """ValueError where the response is no numeric column, with those there are."""
    numeric = [
        name
        for name in table.columns
        if pd.api.types.is_numeric_dtype(table[name])
        and not pd.api.types.is_bool_dtype(table[name])
        and name not in (*FACTORS, SEED)
    ]
    if response not in numeric:
        raise ValueError(
            f"anova: response must be a numeric column, one of {', '.join(numeric) or 'none'}; got {response!r}"
        )


def level(value: Any) -> str:
    """How a factor's value is written in filters, tables and plots; "" where it is empty."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, (int, float, np.integer, np.floating)):
        return f"{value:g}"
    return str(value)


def levels_of(column: pd.Series) -> list[str]:
    """The levels that occur: numbers by size, positions as a block passes them, names in order of appearance."""
    present = [value for value in column.drop_duplicates() if level(value)]
    if pd.api.types.is_numeric_dtype(column):
        present.sort()
    names = [level(value) for value in present]
    order = {"source": SOURCES, "sink": SINKS}.get(str(column.name), ())
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def filtered(table: pd.DataFrame, conditions: Sequence[Condition]) -> pd.DataFrame:
    """The rows that every condition accepts.

    Raises ValueError for columns and values that do not occur, and where no row is left.
    """
    check_columns(table, [each.column for each in conditions], "filter on")
    kept = pd.Series(True, index=table.index)
    for condition in conditions:
        there = levels_of(table[condition.column])
        # positions without runs may be left out by name
        known = {
            *there,
            *(POSITIONS if condition.column in ("source", "sink") and not condition.keeps else ()),
        }
        absent = [value for value in condition.values if value not in known]
        if absent:
            raise ValueError(
                f"anova: filter {condition}: column {condition.column} has no {', '.join(absent)};"
                f" it has {', '.join(there)}"
            )
        kept &= table[condition.column].map(lambda value, rule=condition: rule.accepts(level(value)))
    if not kept.any():
        raise ValueError(f"anova: no row is left by the filters {'; '.join(map(str, conditions))}")
    return table.loc[kept].reset_index(drop=True)
