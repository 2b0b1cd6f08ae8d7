"""The table of a sweep: one row a run, written as CSV and as Parquet; runs without a record are pending."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..formats.atomic import written_beside
from .families import AXES, has_axis
from .folder import asked_runs
from .runs import Run, read_records

PENDING = "pending"
"""The status of a run that was asked for and has no record."""

CSV, PARQUET = "results.csv", "results.parquet"


def write_results(folder: Path) -> pd.DataFrame:
    """Gathers every run of the sweep's folder into results.csv and results.parquet, and returns the table."""
    records = read_records(folder)
    waiting = [pending_record(run) for run in asked_runs(folder) if run.id not in records]
    table = results_table([*records.values(), *waiting])
    with written_beside(folder / CSV) as partial:
        table.to_csv(partial, index=False)
    with written_beside(folder / PARQUET) as partial:
        table.to_parquet(partial, index=False)
    return table


def pending_record(run: Run) -> dict[str, Any]:
    """What the table has of a run that is still to be done, or was interrupted."""
    return {
        "id": run.id, "status": PENDING, "config": run.config, "settings": run.settings, "metrics": {}, "error": None,
    }  # fmt: skip


def results_table(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """id, status, the axes, the figures, the settings, seconds, error and versions; empty where absent.

    An axis is empty too where the run's form does not have it.
    """
    rows = []
    names: dict[str, dict[str, None]] = {
        "axes": {}, "figures": {}, "settings": {}, "versions": {},
    }  # fmt: skip
    for record in records:
        config, figures, settings = record["config"], record["metrics"], record["settings"]
        axes = {name: value if has_axis(config, name) else None for name, value in config.items()}
        versions = {f"{name}_version": value for name, value in record.get("versions", {}).items()}
        for group, values in zip(names.values(), (axes, figures, settings, versions), strict=True):
            group.update(dict.fromkeys(values))
        rows.append({
            "id": record["id"], "status": record["status"], **axes, **figures, **settings,
            "seconds": record.get("seconds"), "error": record["error"], **versions,
        })  # fmt: skip
    order = ["family", *AXES, "seed"]
    axes = sorted(names["axes"], key=lambda name: order.index(name) if name in order else len(order))
    columns = [
        "id", "status", *axes, *names["figures"], *names["settings"], "seconds", "error", *names["versions"],
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=list(dict.fromkeys(columns)))
    sorting = [name for name in axes if table[name].notna().any()]
    table = table.sort_values([*sorting, "id"], na_position="first", kind="stable", ignore_index=True)
    return table.convert_dtypes()
