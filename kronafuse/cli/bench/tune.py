"""`kronafuse bench tune`: the table of tuned configurations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ...bench.tune import Timed
    from ...bench.tune_problems import Problem, Subject

WIDTH = 160
"""Of tables that go into a file."""
SHOWN = 5
"""Candidates of each choice that --dry-run lists."""


def tune(
    kernels: Annotated[
        list[str] | None, typer.Option(help="Kernels and routes, as linear; all by default.")
    ] = None,
    cases: Annotated[
        list[str] | None, typer.Option(help="core, quick, all, or globs on names as sdxl_1280-krona_64x4.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    batch: Annotated[int, typer.Option(help="Images; each brings the case's tokens.")] = 4,
    seconds: Annotated[float, typer.Option(help="Budget, compilations included.")] = 300.0,
    out: Annotated[
        Path, typer.Option(help="Table, written anew after each choice; rows of others stay.")
    ] = Path("runs/tuned.json"),
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that compile ahead; half of the cores, at most 12, by default."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List choices and candidates with predicted times; run nothing.")
    ] = False,
    architecture: Annotated[
        int, typer.Option(help="Compute capability that --dry-run predicts for, as 90.")
    ] = 90,
) -> None:
    """Time the configurations of each kernel on this GPU and write the best into a table.

    Nothing is searched when kernels run: they read the package's table, or the one that KRONAFUSE_TUNED names.
    """
    from ...bench import require_libraries

    require_libraries(("rich", "typer"))
    from rich.console import Console

    from ...bench.tune import cuda_architecture
    from ...bench.tune_candidates import TUNABLES
    from ...bench.tune_problems import problems

    unknown = [name for name in kernels or () if name not in TUNABLES]
    if unknown:
        raise ValueError(f"bench tune: --kernels must be of {', '.join(TUNABLES)}; got {', '.join(unknown)}")
    if batch < 1 or not seconds > 0 or (workers is not None and workers < 1):
        raise ValueError(
            "bench tune: --batch and --workers must be at least 1 and --seconds above 0;"
            f" got {batch}, {workers}, {seconds:g}"
        )
    subjects = subjects_of(cases or ["core"], dtype, batch)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if dry_run:
        list_candidates(console, subjects, kernels or (), architecture)
        return
    here = cuda_architecture()
    chosen = problems(subjects, here, kernels or ())
    run(console, chosen, here.name, seconds, out, workers)


def subjects_of(names: Sequence[str], dtype: str, batch: int) -> list[Subject]:
    """The steps of all suites that the sets or globs name. ValueError where one matches nothing."""
    from dataclasses import replace

    from ...bench.selection import DTYPES, SETS, SUITES, Options, chosen_cases
    from ...bench.tune_problems import Subject

    if dtype not in DTYPES:
        raise ValueError(f"bench tune: --dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    found: list[Subject] = []
    for name in names:
        options = Options(set_name=name) if name in SETS else Options(cases=(name,))
        matched, errors = False, []
        for suite in SUITES:
            try:
                cases: Sequence[Any] = chosen_cases(suite, options)
            except ValueError as error:
                errors.append(error)
                continue
            matched = True
            layers = 3 if suite == "kron_linear_group" else 1
            found += [
                Subject(replace(case, tokens=batch * case.tokens), DTYPES[dtype], layers) for case in cases
            ]
        if not matched:
            raise errors[0]
    return list(dict.fromkeys(found))


def run(
    console: Console, chosen: Sequence[Problem], gpu: str, seconds: float, out: Path, workers: int | None
) -> None:
    """Tunes and shows each choice as it is made. Exits with 1 where choices failed."""
    import torch

    from ...bench.timing import CudaTimer
    from ...bench.tune import SKIPPED
    from ...bench.tune import tune as tune_problems
    from ...bench.tune_compile import compiling, default_workers
    from ..exits import Missed

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def report(timed: Timed) -> None:
        (best, spread), *others = timed.times.items()
        behind = f", the next {others[0][1].median:.2f} µs" if others else ""
        say(f"{timed.problem}: {spread.median:.2f} µs{behind}; {best}")
        for config, why in timed.failures.items():
            say(f"    did not run: {config}: {why}")

    device = torch.cuda.current_device()
    timer = CudaTimer(torch.device("cuda", device))
    say(f"{len(chosen)} choices on {gpu}, {seconds:g} s")
    with compiling(chosen, device, workers or default_workers()) as compilations:
        progress = tune_problems(
            chosen, out, timer=timer, gpu=gpu, seconds=seconds, ready=compilations.wait, report=report
        )
    for name, why in compilations.errors.items():
        say(f"Not compiled ahead: {name}: {why}")
    for name, why in progress.failures.items():
        say(f"Failed: {name}: {why}")
    for problem in progress.left:
        say(f"{SKIPPED}{problem}")
    say(f"{len(progress.rows)} rows written: {out}; kernels read it where KRONAFUSE_TUNED names it")
    if progress.failures:
        raise Missed(f"bench tune: {len(progress.failures)} of {len(chosen)} choices failed")


def list_candidates(
    console: Console, subjects: Sequence[Subject], kernels: Sequence[str], capability: int
) -> None:
    """A table of the choices on the architecture, each with its candidates of the least predicted time."""
    from rich.table import Table

    from ...bench.tune_candidates import valid
    from ...bench.tune_problems import problems
    from ...ops.costs import PEAKS
    from ...ops.launch import Architecture

    if capability not in PEAKS:
        known = ", ".join(str(each) for each in PEAKS)
        raise ValueError(f"bench tune: --architecture must be one of {known}; got {capability}")
    peaks = PEAKS[capability]
    architecture = Architecture(capability, peaks.multiprocessors)
    table = Table(
        "choice",
        "candidates",
        "predicted µs",
        "configuration",
        title=f"sm_{capability} as {peaks.gpu}: predicted",
    )
    for problem in problems(subjects, architecture, kernels):
        predicted = valid(problem.choice)
        for index, (config, time_us) in enumerate(list(predicted.items())[:SHOWN]):
            time_text = "-" if problem.is_route else f"{time_us:.1f}"
            fields = " ".join(
                f"{name}={int(value) if isinstance(value, bool) else value}"
                for name, value in vars(config).items()
            )
            first = (str(problem), str(len(predicted))) if index == 0 else ("", "")
            table.add_row(*first, time_text, fields)
    console.print(table)
