"""`kronafuse sweep`: every run of a grid, once, on Ray; a start after a kill goes on where the last one was."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..formats.atomic import remove_stale, write_json
from ..train.files import prepare_output
from ..train.interrupt import Interrupted, InterruptFlag
from ..train.lock import held
from .cluster import Resources, connected
from .folder import claim
from .grid import Grid, run_id
from .job import Job
from .results import write_results
from .runs import (
    FAILED,
    FINISHED,
    Run,
    check_reserved,
    execute,
    failure,
    is_axis,
    is_finished,
    read_records,
    record_path,
)
from .view import View

TABLE_EVERY = 5
"""Completions after which the results table is written anew."""

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """The grid's runs by how they ended; `ran` are this start's."""

    finished: tuple[str, ...]
    failed: Mapping[str, str]
    ran: tuple[str, ...]


def sweep(
    job: Job,
    settings: Mapping[str, Any],
    grid: Grid,
    folder: Path,
    *,
    resources: Resources | None = None,
    retries: int = 2,
    retry_failed: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Runs what is not finished yet and writes results.csv and results.parquet to `folder`.

    The tables have every run that the folder was ever asked for; those without a record are "pending".

    settings:     the job's, as given; defaults are added
    resources:    Resources() if absent
    retries:      how often a run is started again whose worker process died
    retry_failed: redo the runs that failed before

    A run that raises is recorded and stops no other. Ctrl-C or SIGTERM stops the running ones and raises `Interrupted`.
    Raises ValueError for what the job's check refuses, before anything is written, and for a folder of another
    job or other settings; BlockingIOError where another process is at work in it; before the job prepares
    anything, the errors of `connected`.
    """
    console = console or Console()
    resources = resources or Resources()
    if retries < 0:
        raise ValueError(f"sweep: retries must be at least 0; got {retries}")
    complete = job.complete(settings)
    runs = [Run(run_id(job.name, complete, config), config, complete) for config in grid.configs]
    taken = [name for name in complete if is_axis(name)]
    if taken:
        raise ValueError(f"sweep: settings must not be named as axes; got {', '.join(taken)}")
    check_reserved("sweep: settings", complete)
    if job.check is not None:
        job.check(complete, grid.configs)
    prepare_output(folder)
    with held(folder, "sweep"):
        claim(folder, job, complete, grid.configs)
        records = read_records(folder)
        _check_axes(runs, records, folder)
        status = {run.id: records[run.id]["status"] for run in runs if run.id in records}
        again = (FAILED,) if retry_failed else ()
        pending = [run for run in runs if run.id not in status or status[run.id] in again]
        try:
            if pending:
                write_results(folder)
                ended = Counter(status.values()) - Counter(status.get(run.id) for run in pending)
                ran = _run_all(
                    job, pending, folder, resources, retries,
                    View(console, len(runs), ended[FINISHED], ended[FAILED]),
                )  # fmt: skip
            else:
                ran = []
        finally:
            write_results(folder)
        return _outcome(runs, read_records(folder), ran)


def _check_axes(runs: list[Run], records: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """ValueError for a record of other axes than its run has: the default of one has changed, which no id shows."""
    for run in runs:
        there = records[run.id]["config"] if run.id in records else {}
        differing = [
            f"{name} was {there[name]!r} and is {value!r}"
            for name, value in run.config.items()
            if name in there and there[name] != value
        ]
        if differing:
            raise ValueError(
                f"sweep: {record_path(folder, run.id)} is of other axes: {'; '.join(differing)}."
                " Give another output folder."
            )


def _outcome(runs: list[Run], records: Mapping[str, Mapping[str, Any]], ran: list[str]) -> Outcome:
    finished = tuple(run.id for run in runs if records[run.id]["status"] == FINISHED)
    failed = {run.id: records[run.id]["error"] for run in runs if records[run.id]["status"] == FAILED}
    return Outcome(finished, failed, tuple(ran))


def _run_all(
    job: Job,
    pending: list[Run],
    folder: Path,
    resources: Resources,
    retries: int,
    view: View,
) -> list[str]:
    """Connects, lets the job prepare, and runs all; returns the ids of those that ended."""
    with connected(resources, folder) as slots:
        if job.prepare is not None:
            job.prepare(pending[0].settings, folder)
        return _keep_working(job, pending, folder, resources, retries, slots, view)


def _keep_working(
    job: Job,
    pending: list[Run],
    folder: Path,
    resources: Resources,
    retries: int,
    slots: int,
    view: View,
) -> list[str]:
    """Keeps `slots` runs at work until all are over."""
    import ray

    ran: list[str] = []
    with InterruptFlag() as interrupt, view:
        task = ray.remote(execute).options(
            num_cpus=resources.per_run, num_gpus=resources.gpus, max_retries=retries
        )
        shared_job, queue, running = ray.put(job), list(reversed(pending)), {}
        try:
            while queue or running:
                while queue and len(running) < slots and not interrupt.raised:
                    run = queue.pop()
                    running[task.remote(shared_job, run, folder.resolve(), resources.per_run)] = run
                view.running = len(running)
                if interrupt.raised:
                    raise Interrupted(
                        f"stopped with {len(ran)} more runs done; the same command goes on", interrupt.number
                    )
                for answer in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                    run = running.pop(answer)
                    view.ended_run(_ended(answer, run, folder, retries), len(running))
                    ran.append(run.id)
                    if len(ran) % TABLE_EVERY == 0:
                        write_results(folder)
        finally:
            for answer, run in running.items():
                ray.cancel(answer, force=True)
                ray.wait([answer], timeout=10)
                remove_stale(record_path(folder, run.id))
    return ran


def _ended(answer: Any, run: Run, folder: Path, retries: int) -> dict[str, Any]:
    """The record of a run whose task is over; written here where its worker could not."""
    import ray
    from ray.exceptions import RayError, WorkerCrashedError

    try:
        ray.get(answer)
    except WorkerCrashedError:
        times = f"{retries + 1} times" if retries else "once"
        _record_failure(run, folder, f"the worker process died {times}: it was killed, or memory ran out")
    except RayError as error:
        _record_failure(run, folder, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    return json.loads(record_path(folder, run.id).read_text(encoding="utf-8"))


def _record_failure(run: Run, folder: Path, reason: str) -> None:
    if not is_finished(folder, run.id):
        write_json(record_path(folder, run.id), failure(run, reason))
