"""What a round says of its parts: `round.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ...formats.atomic import write_json
from ..records import Machine

SCHEMA = 1
FILE = "round.json"

Status = Literal[
    "done", "incomplete", "failed", "stopped at its budget", "cannot run", "interrupted", "no time left"
]


@dataclass(frozen=True)
class PartResult:
    """One part of a round.

    started:     seconds after the round began; None where it did not start
    exit_statuses: of its commands in order; None for one that was stopped
    reason:      why it could not run, or what its log ends with
    skipped:     cases and choices that were not begun, by which a part without failures is incomplete
    """

    part: str
    status: Status
    started: float | None = None
    seconds: float = 0.0
    exit_statuses: tuple[int | None, ...] = ()
    reason: str = ""
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class RoundResult:
    """A round: where it ran, how long it took, and its parts."""

    machine: Machine
    seconds: float
    parts: tuple[PartResult, ...]

    def write(self, folder: Path) -> None:
        """`round.json` in the round's folder, whole or not at all."""
        write_json(folder / FILE, {"schema": SCHEMA, **asdict(self)})
