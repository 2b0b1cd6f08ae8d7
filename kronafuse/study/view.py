"""One view of all runs: a live table on a terminal, a line for each run elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .families import describe
from .runs import FAILED

LAST = 6
"""Results shown."""

SHOWN_FIGURES = 3
"""Figures of a run that fit beside its name."""


class View:
    """Counts the runs of a grid and shows them as they end, while it is open.

    total:  runs of the grid
    before: of them, finished by earlier starts
    failed: of them, failed in earlier starts and not redone
    """

    def __init__(self, console: Console, total: int, before: int, failed: int) -> None:
        self.console, self.total = console, total
        self.done, self.failed, self.running = before, failed, 0
        self.ended = 0
        self.started = 0.0
        self.last: deque[Mapping[str, Any]] = deque(maxlen=LAST)
        self._live = (
            Live(console=console, refresh_per_second=2, get_renderable=self.render)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> View:
        self.started = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def ended_run(self, record: Mapping[str, Any], running: int) -> None:
        """A run is over; `running` are still at work."""
        self.ended += 1
        self.running = running
        if record["status"] == FAILED:
            self.failed += 1
        else:
            self.done += 1
        self.last.append(record)
        if self._live is None:
            self.console.print(
                f"[{self.done + self.failed}/{self.total}] {record['id']} {describe(record['config'])}:"
                f" {outcome(record)}; {self.counts()}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip

    @property
    def remaining(self) -> int:
        """Runs that are neither over nor running."""
        return self.total - self.done - self.failed - self.running

    def counts(self) -> str:
        """done, running, failed, remaining, time left."""
        return (
            f"done {self.done}, running {self.running}, failed {self.failed}, remaining {self.remaining},"
            f" time left {self.time_left()}"
        )

    def time_left(self) -> str:
        """At the rate of this start, as h:mm:ss; "?" before its first run is over."""
        if not self.ended:
            return "?"
        left = (time.monotonic() - self.started) / self.ended * (self.remaining + self.running)
        return str(timedelta(seconds=round(left)))

    def render(self) -> Group:
        """The live view."""
        table = Table("run", "adapter", "result")
        for record in self.last:
            table.add_row(record["id"], Text(describe(record["config"])), Text(outcome(record)))
        return Group(table, Text(self.counts()))


def outcome(record: Mapping[str, Any]) -> str:
    """The first figures of a finished run, or the first line of why it failed."""
    if record["status"] == FAILED:
        return f"failed: {record['error'].partition(chr(10))[0]}"
    figures = list(record["metrics"].items())[:SHOWN_FIGURES]
    return ", ".join(f"{name} {value:.4g}" for name, value in figures) + f", {record['seconds']:.1f} s"
