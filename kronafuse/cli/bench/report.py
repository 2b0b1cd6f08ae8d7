"""`kronafuse bench report`: plots and an HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[list[Path], typer.Argument(help="Results; several of one machine become one report.")],
    out: Annotated[Path, typer.Option(help="Folder for the page and the plots.")] = Path("runs/bench-report"),
) -> None:
    """Write the plots (speed, roofline, memory) and one self-contained HTML page."""
    from ...bench import require_libraries

    require_libraries()
    from ...bench.records import Results, joined
    from ...bench.report import write_report

    for path in write_report(joined([Results.read(each) for each in results]), out):
        print(f"Written: {path}")
