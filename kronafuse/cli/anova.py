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

    One-way F is over configurations, as the paper has it (each one's mean over its seeds), and over runs. Runs
    and cells without a result are named and end the command, unless --allow-missing.
    """
    require_libraries(ANOVA_LIBRARIES)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..study.anova.analysis import analyse
    from ..study.anova.report import (
        MARKDOWN,
        NO_POSITIONS,
        POSITIONS_PLOT,
        alias_notes,
        one_way_rows,
        one_way_tables,
        type_two_rows,
        type_two_title,
    )
    from ..train.files import file_name

    folder = output or results.parent / file_name(f"anova-{response}")
    analysis = analyse(
        results, folder,
        response=response, factors=None if factors is None else [each.strip() for each in factors.split(",")],
        where=where or [], interactions=interactions, allow_missing=allow_missing,
    )  # fmt: skip
    console = Console()
    design = analysis.design
    tables = {title: one_way_rows(results) for title, (_, results) in one_way_tables(analysis).items()}
    tables[type_two_title(analysis)] = type_two_rows(analysis.type_two)
    for title, (head, rows) in tables.items():
        table = Table(title=Text(f"{response}: {title}", style="table.title"))
        for name in head:
            table.add_column(Text(name))
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    notes = alias_notes(analysis.type_two)
    notes += [f"Left out: {name} ({why})." for name, why in design.left_out.items()]
    notes += [f"Missing: {name}." for name in design.missing]
    if POSITIONS_PLOT not in analysis.plots.values():
        notes.append(NO_POSITIONS)
    for note in notes:
        console.print(note, markup=False)
    console.print(f"Written: {folder / MARKDOWN}", markup=False, soft_wrap=True)
