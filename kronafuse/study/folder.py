"""A sweep's folder: which job it is of, and what was ever asked of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..formats.atomic import write_json
from .families import Config
from .grid import run_id
from .job import Job
from .runs import RUNS, Run

SWEEP = "sweep.json"
"""The job and the settings of a folder, which all its runs share, and the configurations of all its grids."""


def claim(folder: Path, job: Job, settings: Mapping[str, Any], configs: Sequence[Config]) -> None:
    """Makes the folder this job's with these settings, and adds what it is asked for.

    ValueError that lists what differs where the folder is another job's or has other settings.
    """
    (folder / RUNS).mkdir(exist_ok=True)
    there = read_claim(folder)
    new = {"job": job.name, **settings}
    old = new if there is None else {"job": there["job"], **there["settings"]}
    differing = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise ValueError(
            f"sweep: folder {folder} has runs of other settings: {'; '.join(differing)}."
            " Give another output folder."
        )
    before = [] if there is None else there["configs"]
    asked = {run_id(job.name, settings, config): config for config in [*before, *configs]}
    if there is None or list(asked.values()) != before:
        wanted = {"job": job.name, "settings": dict(settings), "configs": list(asked.values())}
        write_json(folder / SWEEP, wanted)


def read_claim(folder: Path) -> dict[str, Any] | None:
    """job, settings and configs of the folder, None for a new one; ValueError for a file that does not say them."""
    path = folder / SWEEP
    if not path.exists():
        return None
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        return {
            "job": str(there["job"]),
            "settings": dict(there["settings"]),
            "configs": [dict(config) for config in there.get("configs", [])],
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"sweep: {path} does not say which job the folder is of: {error!r}") from error


def asked_runs(folder: Path) -> list[Run]:
    """Every run that the folder was ever asked for."""
    there = read_claim(folder)
    if there is None:
        return []
    job, settings = there["job"], there["settings"]
    return [Run(run_id(job, settings, config), config, settings) for config in there["configs"]]
