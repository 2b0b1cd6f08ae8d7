"""`kronafuse anova`: from a results file to tables, plots and a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ...train.files import file_name, prepare_output
from .design import Design, make_design
from .linear import type_two
from .one_way import OneWay, one_way
from .plots import save_factor, save_positions
from .report import POSITIONS_PLOT, Analysis, write_report
from .table import SEED, filtered, level, parse_condition, read_results

RESPONSE = "accuracy_new"


def analyse(
    path: Path,
    output: Path,
    *,
    response: str = RESPONSE,
    factors: Sequence[str] | None = None,
    where: Sequence[str] = (),
    interactions: bool = False,
    allow_missing: bool = False,
) -> Analysis:
    """Analyses a results file; writes anova.md, anova.json and a PNG for each factor and for the positions.

    response: a numeric column
    factors:  columns; every axis that varies if absent
    where:    "column=value,..." or "column!=value,..."
    interactions: every two factors together, in the type-II table

    Raises ValueError for a file, a response, factors and filters that do not fit, and for missing runs and cells
    unless they are allowed.
    """
    conditions = [parse_condition(each) for each in where]
    table = filtered(read_results(path), conditions)
    design = make_design(table, response, factors=factors, conditions=conditions, allow_missing=allow_missing)
    configurations, runs = one_way_tables(design)
    together = type_two(design, interactions=interactions)
    prepare_output(output)
    analysis = Analysis(
        path.name, tuple(map(str, conditions)), len(table), design, configurations, runs, together,
        _constants(table, response), _plots(output, design),
    )  # fmt: skip
    write_report(output, analysis)
    return analysis


def one_way_tables(design: Design) -> tuple[list[OneWay], list[OneWay]]:
    """Over configurations, then over runs; the same where every configuration was run once.

    A factor without replicates over configurations has a note there; the errors are those over runs.
    """
    runs = one_way(design)
    return (one_way(design.over_configurations(), lenient=True) if design.replicated else runs), runs


def _plots(output: Path, design: Design) -> dict[str, str]:
    plots = {}
    for factor in design.factors:
        name = f"{file_name(f'factor-{factor}', [f'factor-{each}' for each in design.factors])}.png"
        plots[f"{design.response} by {factor}"] = name
        save_factor(output / name, design, factor)
    places = [name for name in ("source", "sink") if name in design.data.columns]
    if len(places) == 2 and len(design.data.drop_duplicates(places)) > 1:
        plots[f"{design.response} by position"] = POSITIONS_PLOT
        save_positions(output / POSITIONS_PLOT, design)
    return plots


def _constants(table: pd.DataFrame, response: str) -> dict[str, str]:
    """Columns with one value in every row: settings, versions and axes that do not vary."""
    found = {}
    for name in table.columns:
        if name in (response, SEED):
            continue
        values = table[name].map(level).unique()
        if len(values) == 1 and values[0]:
            found[str(name)] = str(values[0])
    return found
