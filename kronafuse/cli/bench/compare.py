"""`kronafuse bench compare`: what changed between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WIDTH = 160
"""Of tables that go into a file."""


def compare(
    before: Annotated[Path, typer.Argument(help="Results of the first run.")],
    after: Annotated[Path, typer.Argument(help="Results of the second run.")],
    fail_above: Annotated[
        float | None,
        typer.Option("--fail-above", help="Exit with 1 where something became slower by more percent."),
    ] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="Compare ratios to the frozen layer, as between machines.")
    ] = False,
) -> None:
    """Show what became slower or faster, with the spread of both runs; equal is what cannot be told apart."""
    from ...bench import require_libraries

    require_libraries()
    from rich.console import Console
    from rich.table import Table

    from ...bench.compare import compare_results
    from ...bench.records import Results, Spread
    from ..exits import Missed

    if fail_above is not None and fail_above < 0:
        raise ValueError(f"bench compare: --fail-above must be at least 0; got {fail_above:g}")
    found = compare_results(Results.read(before), Results.read(after), relative=relative)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH

    def shown(spread: Spread, unit: str) -> str:
        low, high = spread.interval
        return f"{spread.median:.4g} {unit} ({low:.4g} to {high:.4g})"

    for line in found.different:
        console.print(f"The runs differ in {line}", markup=False, highlight=False)
    table = Table("case", "arm", "of", "before", "after", "change")
    for each in found.changes:
        change = "equal" if each.equal else f"{each.percent:+.1f} %"
        table.add_row(
            each.what,
            each.arm,
            each.basis,
            shown(each.before, each.unit),
            shown(each.after, each.unit),
            change,
        )
    console.print(table)
    for title, names in (("before", found.only_before), ("after", found.only_after)):
        for name in names:
            console.print(f"Only {title}: {name}", markup=False, highlight=False, soft_wrap=True)
    if not found.changes:
        raise ValueError("bench compare: the two runs have no arm of a case in common")
    if fail_above is not None and found.worst() > fail_above:
        raise Missed(f"bench compare: slower by up to {found.worst():.1f} %, more than {fail_above:g} %")
