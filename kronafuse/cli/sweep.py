"""`kronafuse sweep`: a study file, or options, to the runs of a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..study import SWEEP_LIBRARIES, require_libraries
from .exits import Missed

Values = Annotated[str | None, typer.Option(help="Values, separated by commas.", show_default=False)]


def sweep(
    study: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STUDY]",
            help="TOML file: job, seeds, and the tables settings and adapters.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the runs' records and the results table; runs/sweep if absent, and runs/sweep-smoke"
            " with --smoke.",
            show_default=False,
        ),
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(
            help='"digits" (the default), or your own as module:function, from this folder or installed.'
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Integers, separated by commas.")] = None,
    family: Annotated[
        str | None, typer.Option(help="Of bottleneck, krona, lokr and lora; all of the study's if absent.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help='"all", or pairs as "attn2_out -> ff_in", separated by commas.')
    ] = None,
    source: Values = None,
    sink: Values = None,
    activation: Values = None,
    scale: Values = None,
    width: Values = None,
    budget: Annotated[
        str | None, typer.Option(help="Percent of the model's parameters instead of a width.")
    ] = None,
    init: Values = None,
    form: Annotated[
        str | None, typer.Option(help="bottleneck: of dense, compacter, krona and krona_res.")
    ] = None,
    terms: Annotated[str | None, typer.Option(help="bottleneck: products that compacter sums.")] = None,
    factors: Annotated[
        str | None, typer.Option(help="krona, and bottleneck's krona forms: as 4x8, separated by commas.")
    ] = None,
    factor: Values = None,
    rank: Values = None,
    alpha: Values = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the job, as steps=200; a TOML value, or text."
        ),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(help="Processors that runs may take; all of this machine's if absent.")
    ] = None,
    cpus_per_run: Annotated[int, typer.Option(help="Processors and threads of one run.")] = 1,
    gpus_per_run: Annotated[float, typer.Option(help="GPUs of one run, a fraction included.")] = 0.0,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster's address; the output folder must then be on shared storage."),
    ] = None,
    retries: Annotated[int, typer.Option(help="New starts of a run whose worker process died.")] = 2,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Redo the runs that failed before.")
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="A few steps and one seed: runs everything, learns nothing. --set and --seeds count over it.",
        ),
    ] = False,
) -> None:
    """Train every adapter of a grid once, on Ray, and gather the results in one table.

    An axis given as an option takes the place of the study file's in every family that has it. The same
    command again goes on after a kill and redoes nothing; another grid into the same folder adds to it. The
    table has runs that are still to be done too, as pending.
    Exits with 1 where runs failed.
    """
    require_libraries(SWEEP_LIBRARIES)
    from rich.console import Console

    from ..study.cluster import Resources
    from ..study.job import find_job
    from ..study.request import make_request, read_study
    from ..study.results import CSV, PARQUET
    from ..study.sweep import sweep as run

    axes: dict[str, Any] = {
        "pairs": pairs, "source": source, "sink": sink, "activation": activation, "scale": scale,
        "width": width, "budget": budget, "init": init, "form": form, "terms": terms, "factors": factors,
        "factor": factor, "rank": rank, "alpha": alpha,
    }  # fmt: skip
    request = make_request(
        read_study(study),
        job=job,
        seeds=seeds,
        families=family,
        axes=axes,
        settings=settings or [],
        smoke=smoke,
    )
    found = find_job(request.job)
    folder = output or Path("runs/sweep-smoke" if smoke else "runs/sweep")
    console = Console()
    if smoke:
        console.print("Smoke run: a few steps of each run; its figures mean nothing.", style="bold")
    console.print(f"{len(request.grid.configs)} runs of job {found.name}, into {folder}", markup=False)
    if request.grid.illegal:
        console.print(
            f"Left out, not legal: {len(request.grid.illegal)} pairs ({', '.join(request.grid.illegal)})",
            markup=False,
        )
    settings_of_all = {**request.settings, **(found.smoke if smoke else {}), **request.options}
    outcome = run(
        found, settings_of_all, request.grid, folder,
        resources=Resources(address, cpus, cpus_per_run, gpus_per_run),
        retries=retries, retry_failed=retry_failed, console=console,
    )  # fmt: skip
    before = len(outcome.finished) + len(outcome.failed) - len(outcome.ran)
    console.print(
        f"{len(outcome.finished)} finished, {len(outcome.failed)} failed; {before} of them were there before."
        f" Written: {folder / CSV}, {folder / PARQUET}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if outcome.failed:
        lines = [f"    {run}: {reason}" for run, reason in outcome.failed.items()]
        raise Missed(f"{len(outcome.failed)} runs failed; --retry-failed redoes them:\n" + "\n".join(lines))
