"""`kronafuse demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..train import require_libraries
from .exits import Missed


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the images, the adapter, the figures and the base model.")
    ] = Path("runs/demo"),
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run every part once without learning anything.")
    ] = False,
) -> None:
    """Teach handwritten digits to a small diffusion model that has never seen them, with KronA.

    Exits with 1 where the generated digits miss the accuracy that the demo promises.
    """
    require_libraries()
    from rich.console import Console

    from ..train.digits.demo import ADAPTER, FIGURES, LOSS, SAMPLES, run_demo, shortfalls
    from ..train.digits.recipe import FULL, SMOKE
    from ..train.digits.report import print_report

    console = Console()
    if smoke:
        console.print(
            "Smoke run: a few steps of each part; its figures mean nothing and no target is checked.",
            style="bold",
        )
    figures = run_demo(output, SMOKE if smoke else FULL)
    print_report(figures, console)
    console.print(
        "Written: " + ", ".join(str(output / name) for name in (SAMPLES, LOSS, ADAPTER, FIGURES)),
        soft_wrap=True,
    )
    missed = shortfalls(figures)
    if missed:
        raise Missed("the demo misses its targets: " + "; ".join(missed))
