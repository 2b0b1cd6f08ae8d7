"""One run: its record on the disk, and what a worker does to make it."""

from __future__ import annotations

import json
import math
import platform
import socket
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from .. import env
from ..formats.atomic import write_json
from ..train.streams import replace_unprintable
from ..version import VERSION
from .families import AXES, Config
from .job import Job

RUNS = "runs"
"""The folder of the records, in the sweep's."""

FINISHED, FAILED = "finished", "failed"

RESERVED = ("id", "status", "seconds", "error", "host", "pair")
"""Columns of a results table that are neither figures nor settings; so are those that end in `VERSION_SUFFIX`."""

VERSION_SUFFIX = "_version"


@dataclass(frozen=True)
class Run:
    """One configuration of one job; `id` names it by its job, settings and axes."""

    id: str
    config: Config
    settings: Mapping[str, Any]


def record_path(folder: Path, run: str) -> Path:
    """Where a run's record lies."""
    return folder / RUNS / f"{run}.json"


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Every record by its run's id; ValueError that names a file that is none."""
    return dict(_records(folder))


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((folder / RUNS).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            complete = record["id"] == path.stem and record["status"] in (FINISHED, FAILED)
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"sweep: {path} is no record of a run: {error!r}; delete it to redo the run"
            ) from error
        if not complete:
            raise ValueError(
                f"sweep: {path} is no record of the run it is named after; delete it to redo the run"
            )
        yield path.stem, record


def is_finished(folder: Path, run: str) -> bool:
    """Whether the run's record is there and says so."""
    try:
        return json.loads(record_path(folder, run).read_text(encoding="utf-8"))["status"] == FINISHED
    except (OSError, ValueError, KeyError, TypeError):
        return False


def execute(job: Job, run: Run, folder: Path, threads: int) -> str:
    """Runs the job in a worker and writes the record; returns its status.

    An exception of the job becomes a record of the failure. A finished record that is there already, because
    a worker was killed after writing it, stays untouched.
    """
    import torch

    replace_unprintable()
    if is_finished(folder, run.id):
        return FINISHED
    torch.set_num_threads(threads)
    started = time.perf_counter()
    try:
        metrics = checked_metrics(job.run({**run.settings, **run.config}, folder), run)
    except (Exception, SystemExit) as error:  # Ray would take SystemExit for a dead worker and start again
        if getattr(error, "ray_terminate_msg", None) is not None:
            raise  # Ray ends this worker: the run did not fail, and is started again
        lines = "".join(traceback.format_exception(error))
        text = f"exit code {error.code!r}" if isinstance(error, SystemExit) else str(error)
        record = failure(run, f"{type(error).__name__}: {text}", lines)
    else:
        record = {**_identity(run), "status": FINISHED, "metrics": metrics, "error": None}
    record |= {"seconds": time.perf_counter() - started, "host": socket.gethostname(), "versions": versions()}
    if not is_finished(folder, run.id):
        write_json(record_path(folder, run.id), record)
    return record["status"]


def failure(run: Run, reason: str, lines: str | None = None) -> dict[str, Any]:
    """The record of a run without figures."""
    return {**_identity(run), "status": FAILED, "metrics": {}, "error": reason, "traceback": lines}


def checked_metrics(metrics: Any, run: Run) -> dict[str, float]:
    """The job's figures as plain numbers.

    Raises TypeError for what is no mapping of names to numbers, ValueError for no figures, for one that is
    not finite and for one named as an axis, a setting or another column.
    """
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise TypeError(f"a job must return figures by name; got {metrics!r}")
    plain: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"figure {name!r} must be a number; got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"figure {name!r} must be finite; got {value!r}")
        plain[name] = value if type(value) is int else float(value)
    if not plain:
        raise ValueError("a job must return at least one figure; got none")
    taken = [name for name in plain if name in run.settings or is_axis(name)]
    if taken:
        raise ValueError(f"figures must not be named as axes or settings; got {', '.join(taken)}")
    check_reserved("a job's figures", plain)
    return plain


def is_axis(name: str) -> bool:
    """Whether a results table has the column for an axis, the family or the seed."""
    return name in AXES or name in ("family", "seed")


def check_reserved(what: str, names: Iterable[str]) -> None:
    """ValueError for names of columns that a results table has for itself."""
    taken = [name for name in names if name in RESERVED or name.endswith(VERSION_SUFFIX)]
    if taken:
        raise ValueError(
            f"{what} must not be named {', '.join(taken)}; reserved are: {', '.join(RESERVED)}, *{VERSION_SUFFIX}"
        )


def versions() -> dict[str, str]:
    """What the run was computed with."""
    libraries = {name: env.package_version(name) for name in ("torch", "diffusers")}
    return {
        "kronafuse": VERSION,
        "python": platform.python_version(),
        **{name: version for name, version in libraries.items() if version},
    }


def _identity(run: Run) -> dict[str, Any]:
    return {"id": run.id, "config": dict(run.config), "settings": dict(run.settings)}
