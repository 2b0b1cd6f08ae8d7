"""Cheap jobs for the sweep's tests; workers import them by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def started(folder: Path, config: Mapping[str, Any]) -> Path:
    """Leaves a file that says which process has taken which run, once for every time it was started."""
    notes = folder / "notes"
    notes.mkdir(exist_ok=True)
    name = f"{config['family']}-{config['rank']}-{config['seed']}"
    path = notes / f"{name}-{len(list(notes.glob(name + '-*')))}"
    path.write_text(str(os.getpid()))
    return path


def quick(config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """A figure that is known from the axes."""
    started(folder, config)
    return {"score": config["rank"] + config["seed"] / 10}


def failing(config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Raises for rank 3 until the folder has a file `mended`."""
    started(folder, config)
    if config["rank"] == 3 and not (folder / "mended").exists():
        raise ValueError("rank 3 is not for us")
    return {"score": float(config["rank"])}


def waiting(config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Rank 1 is quick; the others wait, for the kill, until the folder has a file `go`."""
    started(folder, config)
    while config["rank"] > 1 and not (folder / "go").exists():
        time.sleep(0.05)
    return {"score": float(config["rank"]), "process": os.getpid()}


def dying(config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Kills its own process for rank 2, every time."""
    started(folder, config)
    if config["rank"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"score": float(config["rank"])}


def leaving(config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Ends its process with code 3, as a command would."""
    started(folder, config)
    raise SystemExit(3)
