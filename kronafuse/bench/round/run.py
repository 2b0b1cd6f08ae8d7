"""A round of parts, each in a process of its own with a budget; everything lands in one folder and one archive."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from ...formats.atomic import written_beside
from ..device import DEVICE_LOST
from ..machine import command_text, describe
from ..running import SKIPPED as CASE_SKIPPED
from ..tune import SKIPPED as CHOICE_SKIPPED
from .process import GRACE_SECONDS, run_command
from .records import PartResult, RoundResult, Status

SKIPPED = (CASE_SKIPPED, CHOICE_SKIPPED)
"""Begin the lines in which commands name what their budget did not reach."""
LEAST_SECONDS = 10.0
"""A command that lost the device does not run again in less."""
RESERVE_SECONDS = 20.0
"""Of a round: for stopping the last part, the archive and the table."""


@dataclass(frozen=True)
class Command:
    """One command of a part: its words, its log's name, its share of the part's time, its environment.

    again: words with which it runs once more, in a new process, where it lost the device
    """

    words: tuple[str, ...]
    log: str
    share: float = 1.0
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    again: tuple[str, ...] = ()

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
    probe:    runs first; where it fails, the part cannot run, for what it says
    """

    name: str
    budget: float
    reasons: tuple[str, ...]
    commands: Callable[[Path, float], Sequence[Command]]
    probe: Command | None = None


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

    Ctrl-C ends the part that runs, and what is there is kept and archived before KeyboardInterrupt goes on; so does
    SIGTERM under the command line, which raises one.
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
    if part.probe is not None and (status := _run(part.probe, folder, limit, grace_seconds)) != 0:
        said = "it did not end" if status is None else last_line(folder / part.probe.log)
        taken = round(time.monotonic() - started, 1)
        return PartResult(part.name, "cannot run", None, taken, (status,), f"{part.probe.words[0]}: {said}")
    statuses: list[int | None] = []
    ends: list[str] = []
    not_run: list[str] = []
    commands = part.commands(folder, limit - (time.monotonic() - started))
    for index, command in enumerate(commands):
        left = limit - (time.monotonic() - started)
        shares = sum(each.share for each in commands[index:])
        status = _run(command, folder, left * command.share / shares, grace_seconds)
        statuses.append(status)
        ends.append("stopped" if status is None else last_line(folder / command.log))
        not_run += skipped(folder / command.log)
    return PartResult(
        part.name,
        _status(statuses, not_run),
        seconds=round(time.monotonic() - started, 1),
        exit_statuses=tuple(statuses),
        reason="; ".join(ends),
        skipped=tuple(not_run),
    )


def _status(statuses: Sequence[int | None], not_run: Sequence[str]) -> Status:
    """A failure counts where all commands had their time."""
    if None in statuses:
        return "stopped at its budget"
    if any(statuses):
        return "failed"
    return "incomplete" if not_run else "done"


def _run(command: Command, folder: Path, seconds: float, grace_seconds: float) -> int | None:
    """Its exit status, None where it was stopped; after a lost device that of the run that went on."""
    until = time.monotonic() + seconds
    log = folder / command.log
    log.write_text(f"$ {command}\n", encoding="utf-8")
    words = command.words
    while True:
        ended = run_command(
            words,
            log,
            until - time.monotonic(),
            environment=command.environment,
            grace_seconds=grace_seconds,
        )
        if ended.exit_status != DEVICE_LOST or not command.again:
            return ended.exit_status
        if until - time.monotonic() < LEAST_SECONDS:
            return ended.exit_status
        words = (*command.words, *command.again)


def skipped(log: Path) -> list[str]:
    """What a log says was not run for want of time."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line.removeprefix(each) for line in lines for each in SKIPPED if line.startswith(each)]
    return list(dict.fromkeys(found))


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
