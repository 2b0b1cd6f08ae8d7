"""`kronafuse anova`: which choices of a study matter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..study import ANOVA_LIBRARIES, require_libraries


def anova(
    results: Annotated[Path, typer.Argument(help="results.csv or results.parquet of a sweep.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "--out", help="Folder for the report; anova-RESPONSE beside the results if absent."
        ),
    ] = None,
    response: Annotated[str, typer.Option(help="A numeric column.")] = "accuracy_new",
    over: Annotated[
        str, typer.Option(help='What an observation is: "runs", seeds are replicates; "cells", their means.')
    ] = "runs",
    factors: Annotated[
        str | None, typer.Option(help="Columns, separated by commas; every axis that varies if absent.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILTER", help="Rows to take, as source=ff_in,ff_out or source!=res_in; all must hold."
        ),
    ] = None,
    interactions: Annotated[
        bool, typer.Option("--interactions", help="Every two factors together too, in the type-II table.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on without runs and cells that have no result.")
    ] = False,
) -> None:
    """Analyse the variance of a sweep's results: one-way F of each factor, a type-II table, plots, a report.

    Cells without a result are named and end the command, unless --allow-missing.
    """
    require_libraries(ANOVA_LIBRARIES)
    from rich.console import Console
    from rich.table import Table

    from ..study.anova.analysis import analyse
    from ..study.anova.report import MARKDOWN, alias_notes, one_way_rows, type_two_rows

    folder = output or results.parent / f"anova-{response}"
    analysis = analyse(
        results, folder,
        response=response, over=over, factors=None if factors is None else factors.split(","),
        where=where or [], interactions=interactions, allow_missing=allow_missing,
    )  # fmt: skip
    console = Console()
    design = analysis.design
    for title, (head, rows) in {
        f"{response}: one factor at a time, over {len(design.data)} {over}": one_way_rows(analysis.one_way),
        f"{response}: all factors together, type II": type_two_rows(analysis.type_two),
    }.items():
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    notes = alias_notes(analysis.type_two)
    notes += [f"Left out: {name} ({why})." for name, why in design.left_out.items()]
    notes += [f"Missing: {name}." for name in design.missing]
    for note in notes:
        console.print(note, markup=False)
    console.print(f"Written: {folder / MARKDOWN}", markup=False, soft_wrap=True)
