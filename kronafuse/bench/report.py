"""One run as a folder: plots, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ..formats.atomic import written_beside
from .best import best_baseline, by_problem
from .page import PAGE
from .plots import plots
from .records import Results, Row
from .tables import COLUMNS, cells, left_out, machine_lines, title_of
from .targets import targets

NAME = "report.html"


def write_report(results: Results, folder: Path) -> list[Path]:
    """The files that were written: the page first, then the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    images = plots(results)
    written = [folder / NAME, *(folder / f"{name}.png" for name in images)]
    for path, data in zip(written, [page(results, images).encode(), *images.values()], strict=True):
        with written_beside(path) as partial:
            partial.write_bytes(data)
    return written


def page(results: Results, images: dict[str, bytes]) -> str:
    """The HTML, its plots as data URIs."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    measured = by_problem(results.rows)
    rows: dict[tuple, list[Row]] = {}
    for row in results.rows:
        rows.setdefault(row.problem, []).append(row)
    problems = [
        {
            "title": title_of(group[0]),
            "rows": [cells(row, best_baseline(measured[key])) for row in group if row.error is None],
            "remarks": left_out(group),
            "kernels": [(row.arm, ", ".join(row.kernels)) for row in group if row.kernels],
            "truth": next((row.truth_tokens for row in group if row.truth_tokens is not None), None),
        }
        for key, group in rows.items()
    ]
    return environment.from_string(PAGE).render(
        machine=machine_lines(results.machine, results.ceilings),
        columns=COLUMNS,
        problems=problems,
        targets=targets(results),
        steps=results.steps,
        images={name: base64.b64encode(data).decode() for name, data in images.items()},
        has_gpu=results.machine.gpu is not None,
    )
