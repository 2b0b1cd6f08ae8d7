"""`kronafuse anova`: from a results file to tables, plots and a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ...train.files import prepare_output
from .design import RUNS, Design, make_design
from .linear import type_two
from .one_way import one_way
from .plots import save_factor, save_positions
from .report import Analysis, write_report
from .table import SEED, filtered, level, parse_condition, read_results

RESPONSE = "accuracy_new"
POSITIONS_PLOT = "positions.png"


def analyse(
    path: Path,
    output: Path,
    *,
    response: str = RESPONSE,
    over: str = RUNS,
    factors: Sequence[str] | None = None,
    where: Sequence[str] = (),
    interactions: bool = False,
    allow_missing: bool = False,
) -> Analysis:
    """Analyses a results file; writes anova.md, anova.json and a PNG for each factor and for the positions.

    response: a numeric column
    over:     "runs", seeds are replicates; "cells", the mean of each cell's runs
    factors:  columns; every axis that varies if absent
    where:    "column=value,..." or "column!=value,..."
    interactions: every two factors together, in the type-II table

    Raises ValueError for a file, a response, factors and filters that do not fit, and for missing cells unless
    they are allowed.
    """
    conditions = [parse_condition(each) for each in where]
    table = filtered(read_results(path), conditions)
    design = make_design(
        table, response, factors=factors, over=over, conditions=conditions, allow_missing=allow_missing
    )
    alone, together = one_way(design), type_two(design, interactions=interactions)
    prepare_output(output)
    analysis = Analysis(
        path.name, tuple(map(str, conditions)), len(table), design, alone, together,
        _constants(table, response), _plots(output, design),
    )  # fmt: skip
    write_report(output, analysis)
    return analysis


def _plots(output: Path, design: Design) -> dict[str, str]:
    plots = {}
    for factor in design.factors:
        plots[f"{design.response} by {factor}"] = f"factor-{factor}.png"
        save_factor(output / f"factor-{factor}.png", design, factor)
    if {"source", "sink"} <= set(design.data.columns):
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
