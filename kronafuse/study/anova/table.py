"""Results files: read, checked, and filtered by conditions on their columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...nn.positions import PAIRS, POSITIONS, SINKS, SOURCES
from ..families import AXES, describe
from ..runs import FINISHED

FAMILY = "family"
FACTORS = (FAMILY, *AXES)
"""Columns that are factors of a design; the seed makes replicates."""

SEED = "seed"
PAIR = "pair"
"""A column made of source and sink, for `--factors pair`."""

STATUS = "status"
NOTHING = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none"})
"""Words, in lower case, that say in a column of numbers that there is none."""

NAMED = 5
"""So many cells are named in an error."""

WHOLE_BELOW = 2**53
"""Whole floats below this are written without a point, as integers are."""


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
    rows, for one that has none of a design's columns, and for rows with positions that do not exist or are no
    legal pair.
    """
    if not path.is_file():
        raise FileNotFoundError(f"anova: results file {path} does not exist")
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {".csv": read_csv, ".parquet": pd.read_parquet}
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
    _check_positions(path, table)
    return table


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file, with or without a byte order mark and blanks behind commas; only cells without text are empty.

    "None" and "NA" are text, since a level may be called so; `check_response` takes them for empty in a response.
    Raises
    ValueError for a column name that is there twice.
    """
    options: dict[str, Any] = {"encoding": "utf-8-sig", "keep_default_na": False, "skipinitialspace": True}
    # pandas gives the second of two equal names another one.
    names = pd.read_csv(path, header=None, nrows=1, dtype=str, **options).iloc[0]
    twice = sorted(set(names[names.duplicated() & (names != "")]))
    if twice:
        raise ValueError(f"each column must have a name of its own; {', '.join(twice)} is there twice")
    return pd.read_csv(path, na_values=[""], **options)


def _check_positions(path: Path, table: pd.DataFrame) -> None:
    for column, known in (("source", SOURCES), ("sink", SINKS)):
        if column in table.columns:
            unknown = table[column].map(level).map(lambda name, known=known: bool(name) and name not in known)
            if unknown.any():
                raise ValueError(
                    f"anova: {path}: {column} must be one of {', '.join(known)}; got {_quoted(table, unknown, column)}"
                )
    if PAIR in table.columns:
        pairs = {f"{source} -> {sink}" for source, sink in PAIRS}
        illegal = table[PAIR].map(lambda name: bool(level(name)) and name not in pairs)
        if illegal.any():
            raise ValueError(
                f"anova: {path}: the sink may not come before its source; got {_quoted(table, illegal, PAIR)}"
            )


def _quoted(table: pd.DataFrame, rows: pd.Series, column: str) -> str:
    """The first values of a column with the rows that have them."""
    found = [f"{row[column]!r} in row {row_name(row)}" for _, row in table[rows].head(NAMED).iterrows()]
    more = int(rows.sum()) - len(found)
    return "; ".join(found) + (f"; and {more} more" if more else "")


def row_name(row: pd.Series) -> str:
    """A run by its id and axes, or its number from 1 where it has neither."""
    values = {str(name): value for name, value in row.items() if level(value)}
    words = [str(values["id"])] if "id" in values else []
    return " ".join(filter(None, [*words, describe(values)])) or str(int(str(row.name)) + 1)


def unfinished(table: pd.DataFrame) -> pd.Series:
    """Which rows are of runs that failed or are still to be done."""
    if STATUS not in table.columns:
        return pd.Series(False, index=table.index)
    return table[STATUS].map(level) != FINISHED


def check_columns(table: pd.DataFrame, names: Sequence[str], what: str) -> None:
    """ValueError that lists the columns that are missing and those that are there."""
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise ValueError(
            f"anova: {what} {', '.join(missing)}: no such column; the file has {', '.join(table.columns)}"
        )


def check_response(table: pd.DataFrame, response: str) -> pd.Series:
    """The response as numbers, NaN where a cell is empty or says so ("NA", "None" and the like).

    ValueError where it is no numeric column, with those there are, and the cells that have other text.
    """
    excluded = (*FACTORS, SEED, PAIR, "id", STATUS)
    numbers = {
        str(name): _numbers(table[name])
        for name in table.columns
        if name not in excluded and not _is_boolean(table[name])
    }
    numeric = [name for name, (values, text) in numbers.items() if values.notna().any() and not text.any()]
    values, text = numbers.get(response, (None, None))
    if text is not None and text.any():
        raise ValueError(
            f"anova: response {response} must be a number in every row; got {_quoted(table, text, response)}"
        )
    if response not in numeric or values is None:
        raise ValueError(
            f"anova: response must be a numeric column, one of {', '.join(numeric) or 'none'}; got {response!r}"
        )
    return values


def _numbers(column: pd.Series) -> tuple[pd.Series, pd.Series]:
    """The column as floats, NaN for what is no number, and which cells are neither numbers nor words for none."""
    read = pd.Series(pd.to_numeric(column, errors="coerce"), column.index)
    values = pd.Series(read.to_numpy(float, na_value=np.nan), column.index)
    return values, values.isna() & ~column.map(level).map(str.strip).map(str.lower).isin(NOTHING)


def _is_boolean(column: pd.Series) -> bool:
    """Whether every value is true or false; a column with empty cells holds them as objects."""
    present = [value for value in column if level(value)]
    return bool(present) and all(isinstance(value, (bool, np.bool_)) for value in present)


def level(value: Any) -> str:
    """How a factor's value is written in filters, tables and plots; "" where it is empty.

    Values that differ are written differently; 1.0 and 1 are the same.
    """
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, (float, np.floating)):
        whole = float(value).is_integer() and abs(value) < WHOLE_BELOW
        return str(int(value)) if whole else repr(float(value))
    return str(value)


def levels_of(column: pd.Series) -> list[str]:
    """The levels that occur: numbers by size, positions as a block passes them, names in order of appearance."""
    present = [value for value in column.drop_duplicates() if level(value)]
    if pd.api.types.is_numeric_dtype(column):
        present.sort()
    names = [level(value) for value in present]
    order = {"source": SOURCES, "sink": SINKS}.get(str(column.name), ())
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def as_written(condition: Condition, column: pd.Series) -> Condition:
    """The condition with its values as `level` writes them: scale=1.0 is scale=1, flip=True is flip=true."""
    if _is_boolean(column):
        return replace(condition, values=tuple(value.lower() for value in condition.values))
    if not pd.api.types.is_numeric_dtype(column):
        return condition
    return replace(condition, values=tuple(_number_level(value) for value in condition.values))


def _number_level(text: str) -> str:
    for kind in (int, float):
        try:
            return level(kind(text))
        except ValueError:
            continue
    return text


def filtered(table: pd.DataFrame, conditions: Sequence[Condition]) -> pd.DataFrame:
    """The rows that every condition accepts.

    Raises ValueError for columns and values that do not occur, and where no row is left.
    """
    check_columns(table, [each.column for each in conditions], "filter on")
    conditions = [as_written(each, table[each.column]) for each in conditions]
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
