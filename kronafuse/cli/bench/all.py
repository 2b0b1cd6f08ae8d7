"""`kronafuse bench all`: one round on a GPU box."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WIDTH = 160
"""Of tables that go into a file."""


def all_parts(
    out: Annotated[
        Path, typer.Option(help="Folder for logs and results; FOLDER.tar.gz is made of it at the end.")
    ],
    only: Annotated[
        str | None, typer.Option(help="Parts, separated by commas: tests, native, core, tune, sanitizer.")
    ] = None,
    tests: Annotated[
        Path | None, typer.Option(help="Folder of the tests; the current folder's by default.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Longest time of the round; 540 by default.")] = None,
) -> None:
    """Tests, 12 core cases with all baselines, tuning and sanitizer in one command of at most 9 minutes.

    Each part is a process with a budget of its own, and writes as it goes; at its budget it is stopped and what
    it wrote is kept. A part that cannot run on this machine says why. Ctrl-C and SIGTERM end the part that runs and
    keep what is there.
    """
    from ...bench import require_libraries

    require_libraries()
    from rich.console import Console

    from ...bench.round.parts import ROUND_SECONDS, Box, parts_of
    from ...bench.round.run import choose, run_round
    from ...bench.round.table import round_table
    from ..exits import Missed

    longest = ROUND_SECONDS if seconds is None else seconds
    if not 0 < longest <= ROUND_SECONDS:
        raise ValueError(
            f"bench all: --seconds must be above 0 and at most {ROUND_SECONDS:.0f}; got {longest:g}"
        )
    box = Box.here(tests)
    parts = choose(parts_of(box), only)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if box.absent:
        console.print(f"Not installed, so left out: {', '.join(box.absent)}", highlight=False, markup=False)
    result = run_round(
        parts,
        out,
        longest,
        say=lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
    )
    console.print(round_table(result))
    failed = [each.part for each in result.parts if each.status == "failed"]
    if failed:
        raise Missed(f"bench all: {', '.join(failed)} failed; the logs are in {out}")
    impossible = [each for each in result.parts if each.status == "cannot run"]
    if only is not None and impossible:
        raise NotImplementedError(
            "bench all: cannot run here: " + "; ".join(f"{each.part}: {each.reason}" for each in impossible)
        )
