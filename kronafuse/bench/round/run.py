"""A round of parts, each in a process of its own with a budget; everything lands in one folder and one archive."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from ...formats.atomic import written_beside
from ..machine import command_text, describe
from .process import GRACE_SECONDS, run_command
from .records import PartResult, RoundResult

RESERVE_SECONDS = 20.0
"""Of a round: for stopping the last part, the archive and the table."""


@dataclass(frozen=True)
class Command:
    """One command of a part: its words, its log's name, its share of the part's time, its environment."""

    words: tuple[str, ...]
    log: str
    share: float = 1.0
    environment: dict[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        """As it would be typed, with absolute paths cut to their last part."""
        given = [f"{name}={PurePath(value).name}" for name, value in self.environment.items()]
        return " ".join([*given, command_text(self.words)])


@dataclass(frozen=True)
class Part:
    """A part of a round.

    budget:   its seconds where every part takes its whole time; what others leave is added
    reasons:  why it cannot run here; empty means that it can
    commands: from the folder that they write to and the seconds that they have
    """

    name: str
    budget: float
    reasons: tuple[str, ...]
    commands: Callable[[Path, float], Sequence[Command]]


def choose(parts: Sequence[Part], only: str | None) -> list[Part]:
    """The parts named in `only`, separated by commas, in the round's order; all where None."""
    if only is None:
        return list(parts)
    names = [each.strip() for each in only.split(",") if each.strip()]
    known = [part.name for part in parts]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"bench all: --only must name parts of the round, separated by commas; got {only!r}; parts:"
            f" {', '.join(known)}"
        )
    return [part for part in parts if part.name in names]


def run_round(
    parts: Sequence[Part],
    folder: Path,
    seconds: float,
    *,
    say: Callable[[str], object] = print,
    reserve_seconds: float = RESERVE_SECONDS,
    grace_seconds: float = GRACE_SECONDS,
) -> RoundResult:
    """Run the parts one after the other within `seconds`, and archive the folder beside it.

    folder: new or empty; `round.json` in it is rewritten after every part

    Ctrl-C ends the part that runs, and what is there is kept and archived before KeyboardInterrupt goes on.
    """
    _prepare(folder)
    started = time.monotonic()
    machine = describe()
    results: list[PartResult] = []
    interrupted = None
    for index, part in enumerate(parts):
        say(f"{part.name} ...")
        later = sum(each.budget for each in parts[index + 1 :] if not each.reasons)
        spent = time.monotonic() - started
        limit = seconds - reserve_seconds - spent - later
        try:
            result = _run_part(part, folder, limit, grace_seconds)
        except KeyboardInterrupt as error:
            result, interrupted = PartResult(part.name, "interrupted"), error
        results.append(replace(result, started=None if result.status == "cannot run" else round(spent, 1)))
        say(f"{part.name}: {result.status}" + (f": {result.reason}" if result.reason else ""))
        RoundResult(machine, round(time.monotonic() - started, 1), tuple(results)).write(folder)
        if interrupted is not None:
            break
    whole = RoundResult(machine, round(time.monotonic() - started, 1), tuple(results))
    whole.write(folder)
    archive(folder)
    if interrupted is not None:
        raise interrupted
    return whole


def _run_part(part: Part, folder: Path, limit: float, grace_seconds: float) -> PartResult:
    if part.reasons:
        return PartResult(part.name, "cannot run", reason="; ".join(part.reasons))
    if limit <= 0:
        return PartResult(part.name, "no time left")
    started = time.monotonic()
    statuses: list[int | None] = []
    ends: list[str] = []
    commands = part.commands(folder, limit)
    for index, command in enumerate(commands):
        left = limit - (time.monotonic() - started)
        shares = sum(each.share for each in commands[index:])
        log = folder / command.log
        log.write_text(f"$ {command}\n", encoding="utf-8")
        ended = run_command(
            command.words,
            log,
            left * command.share / shares,
            environment=command.environment,
            grace_seconds=grace_seconds,
        )
        statuses.append(ended.exit_status)
        ends.append("stopped" if ended.exit_status is None else last_line(log))
    status = (
        "stopped at its budget" if None in statuses else "failed" if any(statuses) else "done"
    )  # a failure counts where all had their time
    taken = round(time.monotonic() - started, 1)
    return PartResult(part.name, status, seconds=taken, exit_statuses=tuple(statuses), reason="; ".join(ends))


def last_line(log: Path, most: int = 160) -> str:
    """The last line of a log that says something."""
    lines = [each.strip(" =\t\r") for each in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((each[:most] for each in reversed(lines) if each), "")


def archive(folder: Path) -> Path:
    """`folder` as FOLDER.tar.gz beside it, whole or not at all."""
    folder = Path(os.path.abspath(folder))
    target = folder.with_name(f"{folder.name}.tar.gz")
    with written_beside(target) as beside:
        made = shutil.make_archive(str(beside), "gztar", root_dir=folder.parent, base_dir=folder.name)
        os.replace(made, beside)
    return target


def _prepare(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"bench all: --out must be a new or an empty folder; {folder} has content")
    folder.mkdir(parents=True, exist_ok=True)
